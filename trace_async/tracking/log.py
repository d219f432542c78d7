"""Read and write `<run_dir>/metrics.jsonl`, the source of truth about a run's figures.

Every line is a flat JSON object with `step`, `time` (Unix seconds) and the metrics. Step s is after s updates of the
policy, and step 0 is the start policy. Several lines may have the same step: first the figures of the update, then
those of its evaluation.
"""

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path

from trace_async.types import Point

METRICS_FILE = "metrics.jsonl"


def read_metrics(run_dir: str | Path) -> list[Point]:
    """Return the points of a run in the order of logging. A metric that was not finite is NaN.

    A last line that a killed process left unfinished is skipped. Any other broken line raises ValueError, which names
    file and line.
    """
    path = Path(run_dir) / METRICS_FILE
    if not path.is_file():
        return []
    points = []
    lines = path.read_bytes().split(b"\n")
    # Behind the last newline is nothing, or the beginning of a line that was never finished.
    for number, line in enumerate(lines[:-1], start=1):
        try:
            record = json.loads(line)
            step, seconds = int(record.pop("step")), float(record.pop("time"))
            metrics = {key: math.nan if value is None else float(value) for key, value in record.items()}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path}:{number}: not a line of metrics ({error})") from error
        points.append(Point(step, seconds, metrics))
    return points


def point_line(point: Point) -> str:
    """Return a point as one line of the file."""
    # JSON has no NaN and no infinity; null stands for all of them.
    metrics = {key: value if math.isfinite(value) else None for key, value in point.metrics.items()}
    return json.dumps({"step": point.step, "time": round(point.time, 3), **metrics}) + "\n"


def write_metrics(run_dir: str | Path, points: Iterable[Point]) -> None:
    """Replace the metrics file of a run in one step."""
    write_whole(Path(run_dir) / METRICS_FILE, "".join(map(point_line, points)))


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader, or a resumed process, sees the whole old file or the whole new one."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_bytes(content.encode() if isinstance(content, str) else content)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
