"""`trace-async env check agent`: agents that cannot be replayed are found, with the place where they part."""

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest

from envs.agent.check import tool_turns
from envs.agent.domain import Agent
from envs.contract.check import check_domain
from tests.support.agents import TOOL
from trace_async.types import Message, Prompt, Task


def domain(path: Path, agent: str) -> Agent:
    rows = [{"id": f"{number}", "keys": ["a"], "answer": str(number)} for number in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    agents = "tests.support.agents"
    return Agent(tasks=str(path), num_heldout=2, agent=f"{agents}:{agent}", verifier=f"{agents}:right_sum")


@pytest.mark.parametrize("agent", ["adder", "plain_adder", "untidy_adder"])
def test_a_deterministic_agent_keeps_the_contract(tmp_path: Path, agent: str):
    findings = check_domain(domain(tmp_path / "tasks.jsonl", agent), num_tasks=1)
    assert [finding.text for finding in findings if finding.level == "error"] == []
    # Of each of the two tasks four calls of its tool, replayed twice.
    assert "16 calls were replayed and came out the same, 16 of them of tools" in [f.text for f in findings]


def test_an_agent_that_is_not_deterministic_is_found_with_the_place_where_it_parts(tmp_path: Path):
    findings = check_domain(domain(tmp_path / "tasks.jsonl", "random_adder"), num_tasks=1)
    words = "cannot be replayed, so not continued by Stage 2: call 2 of the replay is another one"
    errors = [finding.text for finding in findings if finding.level == "error" and words in finding.text]
    assert len(errors) == 2
    for error in errors:
        assert "new message 0 was tool '0." in error


def test_turns_are_made_that_fit_the_tools():
    schema = {
        "type": "object",
        "required": ["n", "kind", "words", "deep"],
        "properties": {
            "n": {"type": "integer"},
            "kind": {"enum": ["x"]},
            "words": {"type": "array", "items": {"type": "string"}},
            "deep": {"type": "object", "properties": {"yes": {"type": "boolean"}}},
            "left_out": {"type": "string"},
        },
    }
    other: dict[str, Any] = {"type": "function", "function": {"name": "other", "parameters": schema}}
    prompt = Prompt(messages=(Message(role="user", content="go"),), tools=(TOOL, other))
    task = Task(id="t", domain="agent", kind="k", data={"word": "word"})
    first, second, *_ = tool_turns(prompt, task, Random(0))
    call = json.loads(first.removeprefix("<tool_call>").removesuffix("</tool_call>"))
    assert call == {"name": "lookup", "arguments": {"key": "word"}}
    arguments = json.loads(second.removeprefix("<tool_call>").removesuffix("</tool_call>"))["arguments"]
    assert (arguments["kind"], arguments["words"], arguments["deep"]) == ("x", ["word"], {"yes": True})
    assert isinstance(arguments["n"], int)
