"""Which faults come in which order: a pure function of the seed.

Every combination of what is done and to whom comes once before any comes again, in an order of the seed's, so ten
minutes meet them all. A fault waits for `updates` more updates, then for its phase.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Literal

Action = Literal["kill", "hang", "slow", "fill", "stop"]
Target = Literal["generator", "prompts", "predictor", "learner", "driver", "raylet", "gcs", "disk"]

TARGETS: dict[Action, tuple[Target, ...]] = {
    "kill": ("generator", "prompts", "predictor", "learner", "driver", "raylet", "gcs"),
    "hang": ("generator", "prompts", "predictor", "learner", "driver"),
    "slow": ("generator", "prompts", "predictor"),
    "fill": ("disk",),
    "stop": ("driver",),
}
"""kill: SIGKILL | hang: SIGSTOP, then SIGCONT | slow: stopped for most of every tenth of a second | fill: nothing more
can be written where the run lies | stop: SIGTERM."""

PHASES = ("", "start", "stage1", "wait_for_trees", "update", "sync", "checkpoint", "eval")
"""As in RUN/phases.json. Empty: at once, whatever is under way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One thing that goes wrong."""

    number: int
    """From 1, in the order of the run."""
    action: Action
    """What is done."""
    target: Target
    """To which process, or to the disk."""
    phase: str
    """During which phase of the run, of PHASES."""
    updates: int
    """Updates to wait for since the last fault; 0: it comes before the last one is overcome."""
    seconds: float
    """How long it lasts; 0 for what happens at once."""

    @property
    def name(self) -> str:
        """`kill generator`."""
        return f"{self.action} {self.target}"

    @property
    def ends_the_driver(self) -> bool:
        """Whether no process is left that could go on by itself."""
        return self.action == "stop" or (self.action == "kill" and self.target in ("driver", "raylet", "gcs"))


def schedule(seed: int) -> Iterator[Fault]:
    """The faults of a run, without end."""
    random = Random(seed)
    deck = [(action, target) for action, targets in TARGETS.items() for target in targets]
    numbers = itertools.count(1)
    while True:
        for action, target in random.sample(deck, len(deck)):
            at_once = action in ("kill", "stop")
            yield Fault(
                number=next(numbers),
                action=action,
                target=target,
                # Nothing can be waited for while the disk is full, and what hangs at the start only delays it.
                phase=random.choice(PHASES) if action == "kill" else "",
                updates=random.choice((0, 1, 1, 2)),
                seconds=0.0 if at_once else round(random.uniform(1.0, 8.0), 1),
            )
