"""What chaos found, for the terminal and as JSON; what a soak's processes held, as a chart."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

import numpy as np

from scripts.bench.chaos.inject import Outcome
from scripts.bench.chaos.processes import Sample
from scripts.comparison.arithmetic import Curve
from scripts.comparison.charts import Axis, Series, line_chart
from trace_async.run.ledger import in_words

CHARTED = ("memory_mib", "shared_mib", "threads", "files", "sockets")


@dataclass(slots=True, kw_only=True)
class Report:
    """Everything that is said of one chaos."""

    seed: int
    minutes: float
    """How long it ran, start and end included."""
    outcomes: Sequence[Outcome]
    drivers: int
    """Processes of `trace-async train`, one after another."""
    updates: int
    """Updates of the run."""
    ledger: dict[str, dict[str, int]]
    """Of the last checkpoint; its sum was checked after every driver."""
    environment: dict[str, float]
    """How often the environment broke down, by method and kind."""
    orphans: int
    """Processes that outlived their driver."""
    mlflow: str
    """The run's status in MLflow at the end."""
    broken: Sequence[str] = field(default_factory=list)
    """What was promised and did not hold."""

    def as_json(self) -> dict[str, Any]:
        """Everything, as plain values."""
        rest = {key: value for key, value in asdict(self).items() if key != "outcomes"}
        return rest | {"outcomes": [outcome.record() for outcome in self.outcomes]}

    def table(self) -> str:
        """For the terminal."""
        by_name: dict[str, list[Outcome]] = defaultdict(list)
        for outcome in self.outcomes:
            by_name[outcome.fault.name].append(outcome)
        header = f"{'fault':<18}{'injected':>9}{'survived':>9}{'resumed':>9}{'median s':>10}{'max s':>8}  under way"
        lines = [header]
        for name, found in sorted(by_name.items()):
            seconds = [outcome.recovered_s for outcome in found if outcome.survived]
            times = f"{median(seconds):>10.1f}{max(seconds):>8.1f}" if seconds else f"{'–':>10}{'–':>8}"
            phases = Counter(phase for outcome in found for phase in outcome.phases)
            lines.append(
                f"{name:<18}{len(found):>9}{sum(o.survived for o in found):>9}{sum(o.resumed for o in found):>9}{times}"
                f"  {', '.join(f'{phase} {count}' for phase, count in phases.most_common())}"
            )
        sums = {kind: sum(counts.values()) for kind, counts in self.ledger.items()}
        lines += [
            f"{self.minutes:.1f} minutes, seed {self.seed}: {self.updates} updates by {self.drivers} drivers",
            f"ledger: {in_words(sums)}",
            f"environment: {in_words({name: round(count) for name, count in self.environment.items()})}",
            f"orphans: {self.orphans}; MLflow: {self.mlflow}",
            *(f"BROKEN: {promise}" for promise in self.broken),
        ]
        return "\n".join(lines)


def soak_charts(samples: Sequence[Sample]) -> dict[str, str]:
    """Return an SVG by name of what is held, a line for each process that was there for at least half of the time."""
    curves: dict[tuple[str, int], list[Sample]] = defaultdict(list)
    for one in samples:
        curves[one.role, one.pid].append(one)
    most = max((len(found) for found in curves.values()), default=0)
    kept = {key: found for key, found in sorted(curves.items()) if 2 * len(found) >= most > 1 and key[0] != "other"}
    charts = {}
    for column in CHARTED:
        series = [
            Series(
                f"{role} {pid}",
                number,
                Curve(
                    np.array([one.seconds / 60 for one in found]),
                    np.array([float(getattr(one, column)) for one in found]),
                ),
            )
            for number, ((role, pid), found) in enumerate(kept.items())
        ]
        if series:
            charts[column] = line_chart(series, Axis("minutes"), Axis(column))
    return charts
