"""Say how many generators a run should have: by a rule, or by order of whoever runs it. Pure but for two small files.

    RUN/scale.json      what `trace-async scale RUN N` asked for; the run reads it
    RUN/generators.json the sizes so far, each with its reason; the run writes it, `trace-async status RUN` reads it

The rule looks at the last updates made at the present size. When the learner waited for trees while the generators were
busy, more of them help; when they stood idle, fewer do.

Example, from 1 to 4 generators: in three updates the learner waits .6, .5 and .55 of the time and the generators are
idle .02: 2. At 2 the learner waits .1 and the generators are idle .3: nothing changes. At 4 they are idle .7: 2.
"""

import json
import math
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path

from trace_async.tracking.log import write_whole

ORDER_FILE = "scale.json"
SIZES_FILE = "generators.json"

WINDOW = 3
"""Updates at one size before the rule says anything."""
WAIT_SHARE = 0.3
"""The learner waits for more than this share of the time: more generators, if they are busy."""
BUSY_IDLE_SHARE = 0.1
"""Generators that are idle for less than this share of the time are busy."""
IDLE_SHARE = 0.5
"""Generators are idle for more than this share of the time: fewer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """A decision."""

    num_generators: int
    """From now on."""
    reason: str
    """In words, for the log and the terminal."""
    update: int
    """Updates made when it was decided."""


class ScalingRule:
    """Decides after every update. `minimum`, `maximum`: the bounds it keeps; equal ones leave it nothing to decide."""

    def __init__(self, minimum: int, maximum: int) -> None:
        self.minimum, self.maximum = minimum, maximum
        self._seen: deque[tuple[float, float]] = deque(maxlen=WINDOW)
        self._size = 0

    def decide(self, size: int, update: int, *, learner_wait: float, generator_idle: float) -> Size | None:
        """`size`: ready generators. The shares of time are those of the update just made. None: no change."""
        if size != self._size:
            self._size = size
            self._seen.clear()  # the update in which the size changed says nothing of it
            return None
        self._seen.append((learner_wait, generator_idle))
        if len(self._seen) < WINDOW:
            return None
        wait, idle = (sum(shares) / WINDOW for shares in zip(*self._seen, strict=True))
        wanted, reason = size, ""
        if wait > WAIT_SHARE and idle < BUSY_IDLE_SHARE:
            wanted = size + math.ceil(size / 2)
            reason = f"the learner waited {wait:.0%} of the time and the generators were idle {idle:.0%}"
        elif idle > IDLE_SHARE:
            wanted = math.ceil(size * (1 - idle) + 0.5)  # those that were busy, and half a one to spare
            reason = f"the generators were idle {idle:.0%} of the time"
        wanted = max(self.minimum, min(self.maximum, wanted))
        if wanted == size:
            return None
        self._seen.clear()
        return Size(num_generators=wanted, reason=reason, update=update)


def order(run_dir: Path, num_generators: int) -> None:
    """Ask a run for so many generators. It changes within seconds, and its rule is off from then on."""
    write_whole(run_dir / ORDER_FILE, json.dumps({"num_generators": num_generators}))


def ordered(run_dir: Path) -> int | None:
    """Return what was asked for last; None: nothing."""
    path = run_dir / ORDER_FILE
    if not path.is_file():
        return None
    try:
        return max(1, int(json.loads(path.read_text(encoding="utf-8"))["num_generators"]))
    except (ValueError, KeyError, TypeError):
        return None  # somebody wrote it by hand: as if nothing was asked for


def keep_sizes(run_dir: Path, sizes: list[Size]) -> None:
    """Write the sizes so far, for `trace-async status` and for a resumed run."""
    write_whole(run_dir / SIZES_FILE, json.dumps([asdict(size) for size in sizes], indent=1))


def kept_sizes(run_dir: Path) -> list[Size]:
    """Return what `keep_sizes` wrote; empty before."""
    path = run_dir / SIZES_FILE
    return [Size(**size) for size in json.loads(path.read_text(encoding="utf-8"))] if path.is_file() else []
