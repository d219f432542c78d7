"""Report what broke down in a run's environments: log each kind once, and count every case in the figures."""

import logging
from collections import Counter
from collections.abc import Mapping

from trace_async.trees.tree import Fault

# A logger of its own, so that `trace-async train` can show these lines in the terminal and leave others in the log.
log = logging.getLogger("trace_async.faults")


class FaultBook:
    """Counts the faults of one run by name. A name is `method.kind`, such as `step.env_timeout`."""

    def __init__(self) -> None:
        self._words: dict[str, str] = {}
        self._since_read: Counter[str] = Counter()

    def enter(self, faults: Mapping[str, Fault]) -> None:
        """Count `faults`. The first message of each name is logged; it names environment, task and method."""
        for name, fault in faults.items():
            self._since_read[name] += fault.count
            if name not in self._words:
                self._words[name] = fault.words
                log.warning("%s (further ones of this kind are counted as faults/%s)", fault.words, name)

    def read(self) -> dict[str, float]:
        """Return, as figures, how often each kind happened since the last call, and start to count anew."""
        counts, self._since_read = self._since_read, Counter()
        return {f"faults/{name}": float(count) for name, count in counts.items()}

    def example(self) -> str:
        """Return a message of the kind that happened most since the last reading; empty when nothing happened."""
        most = self._since_read.most_common(1)
        return self._words[most[0][0]] if most else ""
