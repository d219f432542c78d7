"""What broke down in a run's environments, whatever became of it: told once each, counted in the figures."""

import logging
from collections import Counter
from collections.abc import Mapping

from trace_async.trees.tree import Fault

# Of its own, so that `trace-async train` can show these lines in the terminal and leave the others in the log.
log = logging.getLogger("trace_async.faults")


class FaultBook:
    """One for a run. Names are `method.kind`, such as `step.env_timeout`."""

    def __init__(self) -> None:
        self._words: dict[str, str] = {}
        self._since_read: Counter[str] = Counter()

    def enter(self, faults: Mapping[str, Fault]) -> None:
        """Count them; of each name the first words are logged, with environment, task and method."""
        for name, fault in faults.items():
            self._since_read[name] += fault.count
            if name not in self._words:
                self._words[name] = fault.words
                log.warning("%s (further ones of this kind are counted as faults/%s)", fault.words, name)

    def read(self) -> dict[str, float]:
        """How often each happened since this was last asked, as figures."""
        counts, self._since_read = self._since_read, Counter()
        return {f"faults/{name}": float(count) for name, count in counts.items()}

    def example(self) -> str:
        """Words of the kind that happened most since the last reading; empty when nothing did."""
        most = self._since_read.most_common(1)
        return self._words[most[0][0]] if most else ""
