"""The trainer's part of a checkpoint: counters, ledger, position in the data, trees waiting, prompts under way."""

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from trace_async.method.market import Offer
from trace_async.run.ledger import Ledger
from trace_async.trees.io import read_trees, write_trees
from trace_async.trees.tree import RolloutTree


@dataclass(frozen=True, slots=True, kw_only=True)
class PendingPrompt:
    """A prompt that was admitted and has not ended; on resume it is grown again from its beginning."""

    task_id: str
    num_roots: int
    policy_version: int
    root_value: float | None
    seed: int
    offer: Offer | None = None
    """What the market says to its Stage 2; given when it is sent off and in no checkpoint."""


@dataclass(slots=True)
class RunState:
    """Counters of a run.

    `num_updates`: batches trained on. One without a token of credit changes no weight, so no `policy_version`
    (`updates_without_credit`: of those, how many in a row). `admitted_roots` leaves out what a selection rule filtered
    afterwards. `generated_tokens`: of all trees that arrived, trained or not; evaluation is not charged. `elapsed_s`:
    of training, over all its sessions.
    """

    policy_version: int = 0
    num_updates: int = 0
    updates_without_credit: int = 0
    num_rounds: int = 0
    admitted_roots: int = 0
    num_prompts: int = 0
    generated_tokens: int = 0
    elapsed_s: float = 0.0
    ledger: Ledger = field(default_factory=Ledger)

    def copy(self) -> "RunState":
        return copy.deepcopy(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedTrainer:
    """Everything of the trainer that a run needs to go on."""

    state: RunState
    dataset: Mapping[str, int]
    pending: Sequence[PendingPrompt]
    waiting: Sequence[RolloutTree]


def save_trainer(folder: Path, saved: SavedTrainer) -> None:
    counters = {name: value for name, value in asdict(saved.state).items() if name != "ledger"}
    record = {
        "counters": counters,
        "ledger": saved.state.ledger.state(),
        "dataset": dict(saved.dataset),
        "pending": [asdict(prompt) for prompt in saved.pending],
    }
    (folder / "trainer.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    write_trees(folder / "waiting.jsonl", saved.waiting)


def load_trainer(folder: Path) -> SavedTrainer:
    record: Mapping = json.loads((folder / "trainer.json").read_text(encoding="utf-8"))
    state = RunState(**record["counters"], ledger=Ledger.from_state(record["ledger"]))
    return SavedTrainer(
        state=state,
        dataset=record["dataset"],
        pending=[PendingPrompt(**prompt) for prompt in record["pending"]],
        waiting=list(read_trees(folder / "waiting.jsonl")),
    )
