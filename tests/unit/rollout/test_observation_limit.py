"""`sampling.max_observation_tokens` holds for every domain, end to end: what the model reads is bounded and says so."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from actors.generators.router import Generators
from actors.prompts.prompt import PromptActor
from envs import BUILT_IN
from envs.functions.domain import write_call
from tests.support.paths import ROOT
from trace_async.config import ConfigError, load_config
from trace_async.policy.small_tokenizer import build_tokenizer
from trace_async.run.state import PendingPrompt
from trace_async.trees.tree import RolloutTree
from trace_async.types import Completion, Json, SamplingParams, Task, VersionSpan

LIMIT = 20
PRINTS = "<python> print('9 ' * 99) </python>"


class Wordy:
    """A Gymnasium-style environment that answers at length."""

    def reset(self, *, seed: int) -> tuple[str, dict]:
        return "go", {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict]:
        return "word " * 200, 0.0, False, False, {}


def wordy_task(name: str, tmp_path: Path) -> tuple[list[str], dict[str, Json], str]:
    """Settings of a domain, the data of a task (none: its first one), and a turn that gets a long answer."""
    questions, problems = tmp_path / "questions.json", tmp_path / "problems.jsonl"
    context: list[Json] = [["river", ["water " * 200]]]
    rows = [{"_id": f"{k}", "question": f"how long is {k} ?", "answer": "9", "context": context} for k in range(20)]
    questions.write_text(json.dumps(rows))
    problems.write_text('{"problem": "?", "answer": "1"}\n{"problem": "??", "answer": "2"}\n')
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text("".join(f'{{"keys": ["{key}"], "prompt": "{key}", "answer": "1"}}\n' for key in "ab"))
    common = [f"env.args.tasks={tasks}", "env.args.num_heldout=1", "env.args.verifier=tests.support.agents:right_sum"]
    server = f"{sys.executable},{ROOT / 'tests' / 'support' / 'mcp_server.py'}"
    problem: dict[str, Json] = {"question": "?", "answer": "1"}
    look: dict[str, Json] = {"state": {"folders": {"desk": ["notes"] * 60}}, "requests": ["look", "again"], "calls": []}
    return {
        "multihop": ([], {}, "search [ {question} ]"),
        "qa_files": ([f"env.args.questions={questions}"], {}, "search [ river ]"),
        "math": ([], problem, PRINTS),
        "math_files": ([f"env.args.path={problems}", "env.args.num_heldout=1"], {}, PRINTS),
        "functions": ([], look, write_call("list_files", {"folder": "desk"})),
        "bfcl": ([], {}, write_call("echo", {"content": "word " * 200})),
        "mixed": (["env.args.domains.math={}"], problem, PRINTS),
        "agent": ([*common, "env.args.agent=tests.support.agents:wordy"], {}, "go on"),
        "mcp": ([*common, f"env.args.servers.box.command=[{server}]"], {}, write_call("speech", {})),
        "quest": (["env.args.mix.hard=1.0", "env.args.mix.easy=0.0"], {}, "look"),
        "scienceworld": ([], {}, "look around"),
        "textworld_express": ([], {}, "look around"),
        "gymnasium": ([f"env.args.env={__name__}:Wordy"], {}, "hm"),
    }[name]


class Says:
    """A generator behind Ray's call shape that always says the same."""

    def __init__(self, token_ids: tuple[int, ...]) -> None:
        self.token_ids = token_ids
        self.generate = self

    async def remote(self, prompt_ids: tuple[int, ...], params: SamplingParams) -> Completion:
        return Completion(
            token_ids=self.token_ids,
            logprobs=(-0.1,) * len(self.token_ids),
            version_spans=(VersionSpan(0, 0),),
            finish_reason="stop",
            prompt_tokens=len(prompt_ids),
            cached_tokens=0,
        )


async def play(name: str, limit: int, tmp_path: Path) -> tuple[PromptActor, RolloutTree]:
    settings, data, turn = wordy_task(name, tmp_path)
    settings += [f"env.name={name}", f"sampling.max_observation_tokens={limit}", "budget.stage2=none"]
    settings += ["sampling.max_turn_tokens=2000", "sampling.max_context_tokens=100000"]
    actor = PromptActor(load_config(None, settings), str(tmp_path), None)
    task = actor.domain.tasks("train")[0]
    if data:
        task = Task(id=task.id, domain=task.domain, kind=task.kind, data=data)
    turn = turn.replace("{question}", str(task.data.get("question")))
    says = Says((*actor.renderer.encode_data(turn), actor.renderer.stop_token_ids[0]))
    await actor.announce(Generators({"g": says}), {})
    prompt = PendingPrompt(task_id=task.id, num_roots=1, policy_version=0, root_value=0.5, seed=0)
    tree = await actor.run_prompt(task, prompt)
    close = getattr(actor.domain, "close", None)
    if close is not None:
        await close()
    return actor, tree


@pytest.mark.parametrize("name", BUILT_IN)
async def test_no_observation_is_longer_than_told(name: str, tmp_path: Path) -> None:
    if name == "mcp":
        pytest.importorskip("mcp", reason="the extra mcp is not installed")
    if name in ("scienceworld", "textworld_express"):
        pytest.importorskip(name, reason="the extra worlds is not installed")
        if shutil.which("java") is None:
            pytest.skip("there is no Java")
    if name == "bfcl":
        pytest.importorskip("bfcl_eval", reason="the package bfcl-eval is not installed")
    build_tokenizer(["[ cut ] word"]).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    observations = []
    for limit in (0, LIMIT):
        actor, tree = await play(name, limit, tmp_path)
        observations.append(tree.nodes[1].token_ids[tree.nodes[1].num_generated :])
    frame = 3  # <|tool|> … <|im_end|> <|assistant|>
    assert len(observations[0]) > 2 * LIMIT
    assert len(observations[1]) == LIMIT + frame
    kept = LIMIT - len(actor.renderer.encode_data(" [ cut ]"))
    assert observations[1][: kept + 1] == observations[0][: kept + 1]
    assert actor.renderer.decode(observations[1]).endswith(" [ cut ]<|im_end|><|assistant|>")


def test_a_limit_that_leaves_no_room_is_named() -> None:
    with pytest.raises(ConfigError, match=r"sampling\.max_observation_tokens=3: must be a whole number: 0 or ≥ 16"):
        load_config(None, ["sampling.max_observation_tokens=3"])
