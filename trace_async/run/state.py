"""The trainer's part of a checkpoint: counters, ledger, position in the data, planned and growing prompts, trees."""

import copy
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from trace_async.method.market import Offer
from trace_async.run.checkpoint import CheckpointError
from trace_async.run.ledger import Ledger
from trace_async.trees.io import read_trees, write_trees
from trace_async.trees.tree import RolloutTree

FORMAT = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedPrompt:
    """A prompt that Stage 1 chose and that has not started: its budget is not spent yet."""

    task_id: str
    num_roots: int
    """Root rollouts that Stage 1 gave it (m_i)."""
    root_value: float | None
    """V(prompt) as it was believed when the round was planned."""
    root_strength: float | None = None
    """Pseudo rollouts behind that belief."""
    seed: int
    """Seed of its own random choices, such as those of Stage 2."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PendingPrompt:
    """A prompt that has started and has not ended; on resume it is grown again from its beginning."""

    task_id: str
    num_roots: int
    policy_version: int
    """The learner's version when it started: its tree must be trained at most `max_staleness` versions later."""
    root_value: float | None
    root_strength: float | None = None
    seed: int
    offer: Offer | None = None
    """What the market says to its Stage 2; given when it is sent off and in no checkpoint."""


@dataclass(slots=True)
class RunState:
    """Counters of a run; owned and changed by `Rounds` only."""

    policy_version: int = 0
    """How many times the weights have changed."""
    num_updates: int = 0
    """Batches trained on. One without a token of credit changes no weight, so no `policy_version`."""
    updates_without_credit: int = 0
    """Of those without credit, how many in a row up to now."""
    updates_not_finite: int = 0
    """Of those whose step was left out since loss or gradient was not finite, how many in a row up to now."""
    num_rounds: int = 0
    """Rounds of Stage 1 that were planned."""
    num_prompts: int = 0
    """Prompts that started."""
    generated_tokens: int = 0
    """Of all trees that arrived, trained or not; evaluation is not charged."""
    elapsed_s: float = 0.0
    """Seconds of training, over all sessions of the run."""
    lost_candidates: Counter[str] = field(default_factory=Counter)
    """Candidates of Stage 1 whose environment could not be started, by kind of loss; nothing was allocated to them."""
    ledger: Ledger = field(default_factory=Ledger)

    def copy(self) -> "RunState":
        return copy.deepcopy(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedTrainer:
    """Everything of the trainer that a run needs to go on."""

    state: RunState
    dataset: Mapping[str, int]
    planned: Sequence[PlannedPrompt]
    pending: Mapping[int, PendingPrompt]
    """By ticket, the prompt's number in the run."""
    waiting: Sequence[RolloutTree]

    def check_ledger(self) -> None:
        """Assert that every rollout that was ever allocated is somewhere."""
        self.state.ledger.check(
            waiting=sum(len(tree.rollouts) for tree in self.waiting),
            in_flight_roots=sum(prompt.num_roots for prompt in self.pending.values()),
        )


def save_trainer(folder: Path, saved: SavedTrainer) -> None:
    """Write the trainer's part of a checkpoint into `folder`."""
    # Not asdict: before Python 3.12 it makes a Counter of pairs out of a Counter.
    counters = {one.name: getattr(saved.state, one.name) for one in fields(saved.state) if one.name != "ledger"}
    record = {
        "format": FORMAT,
        "counters": counters,
        "ledger": saved.state.ledger.state(),
        "dataset": dict(saved.dataset),
        "planned": [asdict(prompt) for prompt in saved.planned],
        "pending": [{"ticket": ticket} | asdict(prompt) for ticket, prompt in saved.pending.items()],
    }
    (folder / "trainer.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    write_trees(folder / "waiting.jsonl", saved.waiting)


def load_trainer(folder: Path) -> SavedTrainer:
    """Return what `save_trainer` wrote. Raises CheckpointError when another version of this program wrote it."""
    path = folder / "trainer.json"
    record: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if record.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} was written in format {record.get('format', 1)}, and this version of trace_async reads format "
            f"{FORMAT}: finish the run with the version that began it, or start from its policy (`trace-async export`)"
        )
    counters = record["counters"] | {"lost_candidates": Counter(record["counters"]["lost_candidates"])}
    return SavedTrainer(
        state=RunState(**counters, ledger=Ledger.from_state(record["ledger"])),
        dataset=record["dataset"],
        planned=[PlannedPrompt(**prompt) for prompt in record["planned"]],
        pending={prompt.pop("ticket"): PendingPrompt(**prompt) for prompt in record["pending"]},
        waiting=list(read_trees(folder / "waiting.jsonl")),
    )
