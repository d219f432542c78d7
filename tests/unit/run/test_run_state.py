"""The trainer's part of a checkpoint comes back as it was."""

from pathlib import Path

from tests.unit.run.test_buffer import make_tree
from trace_async.run.state import PendingPrompt, RunState, SavedTrainer, load_trainer, save_trainer


def test_round_trip(tmp_path: Path):
    state = RunState(policy_version=3, num_rounds=5, admitted_roots=20, generated_tokens=999, elapsed_s=1.5)
    state.ledger.allocate_roots(20)
    state.ledger.lose_tree(2, "tree_timeout")
    saved = SavedTrainer(
        state=state,
        dataset={"seed": 0, "num_tasks": 9, "epoch": 1, "position": 4},
        pending=[PendingPrompt(task_id="t", num_roots=2, policy_version=3, root_value=0.25, seed=1)],
        waiting=[make_tree("a", version=2), make_tree("b", version=3)],
    )
    save_trainer(tmp_path, saved)
    assert load_trainer(tmp_path) == saved
