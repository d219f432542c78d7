"""The trainer's part of a checkpoint comes back as it was."""

import json
from pathlib import Path

import pytest

from tests.unit.run.test_buffer import make_tree
from trace_async.run.checkpoint import CheckpointError
from trace_async.run.state import PendingPrompt, PlannedPrompt, RunState, SavedTrainer, load_trainer, save_trainer
from trace_async.types import LossKind


def test_round_trip(tmp_path: Path):
    state = RunState(policy_version=3, num_rounds=5, num_prompts=20, generated_tokens=999, elapsed_s=1.5)
    state.ledger.allocate_roots(20)
    state.ledger.lose_tree(2, LossKind.TREE_TIMEOUT)
    state.lost_candidates.update([LossKind.ENV, LossKind.ENV, LossKind.ENV_TIMEOUT])
    saved = SavedTrainer(
        state=state,
        dataset={"seed": 0, "num_tasks": 9, "epoch": 1, "position": 4},
        planned=[PlannedPrompt(task_id="u", num_roots=3, root_value=None, seed=2)],
        pending={7: PendingPrompt(task_id="t", num_roots=2, policy_version=3, root_value=0.25, seed=1)},
        waiting=[make_tree("a", version=2), make_tree("b", version=3)],
    )
    save_trainer(tmp_path, saved)
    assert load_trainer(tmp_path) == saved


def test_a_checkpoint_of_another_version_of_the_program_is_refused_in_words(tmp_path: Path):
    (tmp_path / "trainer.json").write_text(json.dumps({"counters": {}, "ledger": {}, "dataset": {}, "pending": []}))
    with pytest.raises(CheckpointError, match=r"trainer.json was written in format 1, and .* reads format 2"):
        load_trainer(tmp_path)
