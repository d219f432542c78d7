"""Tools of a real MCP server: calls with limits, answers cut, forks by replay or by the server's own snapshots."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mcp", reason="the extra mcp is not installed")

from envs.mcp.domain import Mcp
from tests.support.paths import ROOT
from tests.support.scripted_policy import TOKENIZER, ScriptedPolicy, grow_tree, says
from trace_async.config import ConfigError
from trace_async.engines.servers.server import free_port
from trace_async.method.anchors import Anchor
from trace_async.rollout.expansion import Expansion
from trace_async.trees.tree import RolloutTree

COMMAND = [sys.executable, str(ROOT / "tests" / "support" / "mcp_server.py")]
Make = Callable[..., Mcp]


def right(task: dict[str, Any], outcome: Any) -> bool:
    return bool(outcome.answer == task["answer"])


@pytest.fixture
async def make(tmp_path: Path) -> AsyncIterator[Make]:
    path = tmp_path / "tasks.jsonl"
    rows = [{"id": name, "prompt": "fill the box", "answer": "7"} for name in "ab"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = []

    def build(server: dict[str, Any] | None = None, **changes: Any) -> Mcp:
        servers = {"box": {"command": COMMAND} if server is None else server}
        args: dict[str, Any] = {
            "servers": servers,
            "tasks": str(path),
            "num_heldout": 1,
            "verifier": f"{__name__}:right",
        } | changes
        made.append(Mcp(**args))
        return made[-1]

    yield build
    for domain in made:
        await domain.close()


def call(name: str, **arguments: Any) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def text(tree: RolloutTree, node: int) -> str:
    return TOKENIZER.decode(list(tree.nodes[node].token_ids))


def two_after_the_last() -> Expansion:
    def plan(anchors: Sequence[Anchor], budget: int) -> np.ndarray:
        return np.array([0] * (len(anchors) - 1) + [budget])

    return Expansion(plan=plan, per_root=2)


FILLED = (call("put", number=3) + "\n" + call("put", number=4), call("total"), "7", call("total"), call("total"))


async def test_tools_are_shown_called_and_answered(make: Make):
    tree = await grow_tree(make(instructions="use the box", tools=["put", "total"]), says(*FILLED[:3]))
    assert [(r.reward, r.metrics) for r in tree.rollouts] == [(1.0, {"requests": 3.0, "tool_calls": 3.0})]
    assert '"name": "put"' in text(tree, 0)
    assert '"name": "dice"' not in text(tree, 0)
    assert "<tool_response>\n1 in the box\n</tool_response>\n<tool_response>\n2 in the box" in text(tree, 1)
    assert "<tool_response>\n7\n" in text(tree, 2)


@pytest.mark.parametrize("snapshots", [{}, {"save": "save", "restore": "restore"}])
async def test_a_fork_has_the_state_of_its_turn(make: Make, snapshots: dict[str, str]):
    domain = make({"command": COMMAND, **snapshots})
    told: list[str] = []

    def say(context: str) -> str:
        turn = context.count("<|im_start|>assistant\n")
        told.append(context)
        if turn == 3:  # the root rollout ends here, the continuations go on
            return "7" if len(told) == 3 else call("put", number=1)
        return FILLED[turn - 1] if turn < 3 else (call("total") if turn == 4 else "7")

    tree = await grow_tree(domain, ScriptedPolicy(say), two_after_the_last())
    assert tree.failures == {}, tree.faults
    assert [rollout.kind for rollout in tree.rollouts] == ["root", "continuation", "continuation"]
    # Each continuation puts its own 1 to the 3 and 4 that were there, and sees nothing of the other.
    seen = [text(tree, node) for rollout in (1, 2) for node in tree.fresh_nodes(rollout)]
    assert sum("3 in the box" in one for one in seen) == 2
    assert sum("<tool_response>\n8\n" in one for one in seen) == 2


async def test_an_answer_that_changes_makes_the_fork_diverge(make: Make):
    tree = await grow_tree(make(), says(call("dice"), call("total"), "7"), two_after_the_last())
    assert tree.failures == {"replay_diverged": 2}
    assert any("call 1 of the replay, dice, answered '0." in fault.words for fault in tree.faults.values())


async def test_what_the_model_does_wrong_is_told_and_what_breaks_is_counted(make: Make):
    wrong = (call("nothing"), call("put", number="many"), call("put"), "7")
    tree = await grow_tree(make(), says(*wrong))
    assert "error: there is no tool nothing" in text(tree, 1)
    assert "error:" in text(tree, 2)
    assert "error:" in text(tree, 3)
    assert tree.rollouts[0].reward == 1.0
    tree = await grow_tree(make(), says(call("leave")))
    assert tree.failures == {"env_error": 1}
    assert any("MCP server box" in fault.words for fault in tree.faults.values())
    tree = await grow_tree(make(call_timeout_s=2.0), says(call("nap")))
    assert tree.failures == {"env_timeout": 1}
    assert any("env.args.call_timeout_s=2" in fault.words for fault in tree.faults.values())


async def test_answers_are_cut_and_endless_rollouts_end(make: Make):
    tree = await grow_tree(make(max_observation_chars=40, max_turns=3), ScriptedPolicy(lambda _: call("speech")))
    assert text(tree, 1).count("word") == 8
    assert "[ cut ]" in text(tree, 1)
    assert (tree.rollouts[0].reward, len(tree.nodes)) == (0.0, 4)


async def test_a_server_over_http_serves_as_well(make: Make):
    port = free_port()
    process = await asyncio.create_subprocess_exec(*COMMAND, str(port), stderr=asyncio.subprocess.DEVNULL)
    try:
        async with asyncio.timeout(60):
            while True:
                try:
                    _, writer = await asyncio.open_connection("127.0.0.1", port)
                except OSError:
                    await asyncio.sleep(0.1)
                else:
                    writer.close()
                    break
        tree = await grow_tree(make({"url": f"http://127.0.0.1:{port}/mcp", "stateless": True}), says(*FILLED[:3]))
        assert tree.rollouts[0].reward == 1.0, tree.faults
    finally:
        process.kill()
        await process.wait()


def test_settings_that_cannot_be_are_refused_in_words(make: Make):
    for changes, words in (
        ({"servers": {}}, "name at least one"),
        ({"servers": {"a": {}}}, r"servers\.a: give either command"),
        ({"servers": {"a": {"command": "x y"}}}, r"servers\.a\.command='x y': a list of words"),
        ({"servers": {"a": {"url": "u", "colour": 1}}}, "colour"),
        ({"servers": {"a": {"url": "u", "save": "s"}}}, "save and restore go together"),
        ({"max_turns": 0}, r"max_turns=0: must be > 0"),
    ):
        with pytest.raises(ConfigError, match=words):
            make(**changes)


async def test_a_server_that_cannot_start_is_named(make: Make):
    tree = await grow_tree(make({"command": ["/no/such/server"]}), says())
    assert tree.failures == {"env_error": 1}
    assert any("MCP server box cannot be used" in fault.words for fault in tree.faults.values())
