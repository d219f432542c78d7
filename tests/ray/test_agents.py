"""Agents over HTTP trained on real Ray actors: Stage 2 by replay, agents that misbehave, and nothing left behind."""

import asyncio
import json
import sys
from pathlib import Path

import pytest

from actors.trainer import Trainer
from tests.ray.test_end_to_end import SMALL, Recorder
from tests.ray.test_survival import kill
from tests.support.paths import ROOT
from trace_async.config import Config, load_config

AGENTS = "tests.support.agents"


def agent_config(tmp_path: Path, *overrides: str, acts: dict[int, str] | None = None, **args: object) -> Config:
    """Twelve tasks in the words of the tiny policy, four of them held out; `acts[i]` is what goes wrong with task i."""
    folder = tmp_path / "agents"
    folder.mkdir(exist_ok=True)
    common = {"told": str(folder / "told"), "pids": str(folder)}
    rows = [{"word": 10 + index, "acts": (acts or {}).get(index), **common} for index in range(12)]
    tasks, heldout = tmp_path / "tasks.jsonl", tmp_path / "heldout.jsonl"
    tasks.write_text("".join(json.dumps(row) + "\n" for row in rows[:8]))
    heldout.write_text("".join(json.dumps({**row, "id": f"heldout-{row['word']}"}) + "\n" for row in rows[8:]))
    given = {"agent": f"{AGENTS}:counter"} | args
    given |= {"tasks": str(tasks), "heldout": str(heldout), "verifier": f"{AGENTS}:mostly_even"}
    settings = [*SMALL, "env.name=agent", f"env.args={json.dumps(given)}", f"output_dir={tmp_path}", "eval.num_tasks=4"]
    settings += ["budget={root_rollouts: 8, pool_size: 8, warmup_rounds: 0, continuations_per_root: 1}"]
    return load_config(None, [*settings, *overrides])


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("blocking", ["false", "true"])
async def test_agents_are_trained_with_continuations_by_replay_and_nothing_is_lost(
    tiny_policy_path: Path, tmp_path: Path, blocking: str
):
    recorder = Recorder()
    config = agent_config(tmp_path, "num_updates=3", f"env.blocking={blocking}")
    trainer = Trainer(config, tmp_path, tiny_policy_path, recorder)
    ledger = (await trainer.run()).ledger
    assert len(recorder.updates) == 3
    assert dict(ledger.failed) == {}
    assert ledger.trained["root"] >= 24
    assert ledger.trained["continuation"] == ledger.allocated["continuation"] > 0
    assert [name for update in recorder.updates for name in update if name.startswith("faults/")] == []
    # The turns that were answered from the record cost no generated token, and their prompts come from the cache.
    assert all(update["tokens/cached_share"] > 0.3 for update in recorder.updates)


@pytest.mark.usefixtures("local_ray")
async def test_agents_that_crash_hang_never_ask_or_ask_after_their_end_are_counted_and_the_run_goes_on(
    tiny_policy_path: Path, tmp_path: Path
):
    recorder = Recorder()
    acts = {0: "crashes", 1: "hangs", 2: "never_asks", 3: "asks_late"}
    config = agent_config(tmp_path, "num_updates=4", "actors.max_rollout_retries=0", acts=acts, turn_timeout_s=2.0)
    ledger = (await Trainer(config, tmp_path, tiny_policy_path, recorder).run()).ledger
    assert len(recorder.updates) == 4
    assert ledger.trained["continuation"] > 0
    assert set(ledger.failed) == {"env_error", "env_timeout"}
    faults = {name for update in recorder.updates for name in update if name.startswith("faults/")}
    assert {"faults/answer.env_error", "faults/answer.env_timeout"} <= faults
    told = (tmp_path / "agents" / "told").read_text().splitlines()
    assert set(told) == {"this rollout has ended, or never was"}


def pids(tmp_path: Path) -> set[int]:
    return {int(path.name) for path in (tmp_path / "agents").iterdir() if path.name.isdigit()}


def runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.mark.usefixtures("local_ray")
async def test_commands_end_with_their_prompt_actor_however_it_ends(tiny_policy_path: Path, tmp_path: Path):
    command = [sys.executable, "-m", AGENTS, "counter"]
    small = ["num_updates=1", "budget.root_rollouts=4", "budget.pool_size=4", "eval.num_tasks=2"]
    config = agent_config(tmp_path, *small, agent="", command=command, cwd=str(ROOT), max_running=3)
    trainer = Trainer(config, tmp_path, tiny_policy_path, Recorder())
    running = asyncio.create_task(trainer.run())
    while len(pids(tmp_path)) < 4 and not running.done():
        await asyncio.sleep(0.1)
    before = pids(tmp_path)
    await kill(trainer.prompts.actors[0])
    async with asyncio.timeout(60):
        while any(map(runs, before)):
            await asyncio.sleep(0.1)
    await running
    async with asyncio.timeout(60):
        while any(map(runs, pids(tmp_path))):
            await asyncio.sleep(0.1)
    assert len(pids(tmp_path)) > len(before)
