"""Say the last words of a run whose own process can say none: killed, out of memory, or ended by Ray.

`trace-async train` starts one beside itself. It waits on a pipe that closes when the run's process is gone, whatever
took it away. Then it says how to go on, and ends the run in MLflow, where it would stay RUNNING.
"""

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from trace_async.run.session import how_it_ended, last_session, resume_command

ENDED_IN_ORDER = b"ended in order"
EXIT_LIMIT_S = 60.0


@contextlib.contextmanager
def witnessed(run_dir: Path) -> Iterator[None]:
    """In the block, a process of its own session watches this one."""
    command = [sys.executable, "-m", "scripts.commands.witness", str(run_dir.absolute())]
    # A session of its own: Ctrl-C and a kill of the whole group do not reach it.
    witness = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # it was killed before us
            witness.communicate(ENDED_IN_ORDER)


def main(run_dir: Path) -> None:
    """Wait for the end of the run's process, and speak when it could not."""
    if sys.stdin.buffer.read() == ENDED_IN_ORDER:
        return
    session = last_session(run_dir)
    deadline = time.monotonic() + EXIT_LIMIT_S
    while session is not None and session.is_alive() and time.monotonic() < deadline:
        time.sleep(0.05)  # its files are closed a moment before it is gone
    how = how_it_ended(run_dir)
    if how is None:
        return
    print(f"\ntrace-async: {how}. Go on with it: {resume_command(run_dir)}", file=sys.stderr, flush=True)
    from trace_async.config import load_config
    from trace_async.tracking.mlflow_tracker import end_abandoned

    end_abandoned(load_config(run_dir / "config.yaml"), run_dir)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
