"""Do to a run what the schedule says, and tell what came of it."""

import contextlib
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import psutil

from scripts.bench.chaos.disk import Disk
from scripts.bench.chaos.run import LimitError, Run
from scripts.bench.chaos.schedule import Fault

SLOW_CYCLE_S = 0.1
SLOW_SHARE = 0.8
MAX_RESUMES = 6
ROLES = ("generator", "prompts", "predictor", "learner")


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What a fault met and what came of it."""

    fault: Fault
    at: float
    """Unix seconds at which it began."""
    phases: tuple[str, ...] = ()
    """What was under way then."""
    survived: bool = False
    """Whether an update was made afterwards, with all processes there again."""
    resumed: bool = False
    """Whether it took `--resume`; else the run went on by itself."""
    recovered_s: float = 0.0
    """Seconds from the fault to the first update after it."""

    def record(self) -> dict[str, Any]:
        """As JSON keeps it."""
        return asdict(self.fault) | {key: value for key, value in asdict(self).items() if key != "fault"}


class Chaos:
    """Plays faults to a run, one by one. `outcomes` has them all; `open` those that are not overcome yet."""

    def __init__(self, run: Run, disk: Disk, num_processes: dict[str, int]) -> None:
        """`num_processes`: how many of each role there are when the run is whole."""
        self.run, self.disk, self.num_processes = run, disk, num_processes
        self.outcomes: list[Outcome] = []
        self.open: list[Outcome] = []
        self._gone: set[int] = set()  # processes that were killed

    def play(self, fault: Fault) -> None:
        """Wait for the fault's moment and do it. Raises LimitError when the last one is not overcome."""
        run = self.run
        if fault.updates:
            self.recover()
        wanted = run.num_updates() + max(0, fault.updates - 1)  # overcoming the last fault took one
        self._until(f"update {wanted}", lambda: run.num_updates() >= wanted)
        if fault.phase == "start":
            run.kill_driver()
            run.check_end(killed=True)
            run.start()
        elif fault.phase:
            self._until(f"phase {fault.phase}", lambda: fault.phase in run.phases(), every_s=0.002)
        if fault.target != "disk":
            self._until(f"a process that is {fault.target}", lambda: run.processes(fault.target))
        outcome = Outcome(fault=fault, at=time.time(), phases=tuple(run.phases()))
        self.outcomes.append(outcome)
        self.open.append(outcome)
        self._do(fault)

    def recover(self) -> None:
        """Wait until the open faults are overcome. Raises LimitError."""
        run, whole_at = self.run, 0.0
        deadline = time.monotonic() + run.limit_s
        resumes = 0
        while self.open:
            if run.driver.poll() is not None:
                resumes, whole_at = resumes + 1, 0.0
                self._go_on()
            if time.monotonic() > deadline or resumes > MAX_RESUMES:
                names = ", ".join(outcome.fault.name for outcome in self.open)
                raise LimitError(f"no update within {run.limit_s:g} s and {resumes} resumes after: {names}")
            if not whole_at and self._is_whole():
                whole_at = time.time()
            newest = max((point.time for point in run.updates()), default=0.0)
            if whole_at and newest > whole_at:
                for outcome in self.open:
                    outcome.survived, outcome.recovered_s = True, round(newest - outcome.at, 1)
                self.open = []
            time.sleep(0.2)

    def _is_whole(self) -> bool:
        found = {role: {p.pid for p in self.run.processes(role)} - self._gone for role in ROLES}
        return all(len(found[role]) >= count for role, count in self.num_processes.items())

    def _go_on(self) -> None:
        """The driver has ended: look at what it left and resume."""
        if not self.open:
            self.run.broken.append(f"driver {self.run.num_drivers} ended and nothing had been done to it")
        killed = any(o.fault.ends_the_driver and o.fault.action == "kill" for o in self.open)
        self.run.check_end(killed=killed)
        for outcome in self.open:
            outcome.resumed = True
        self.run.start()

    def _until(self, what: str, happened: Any, every_s: float = 0.2) -> None:
        """As `Run.wait`, through ends of the driver."""
        for _ in range(MAX_RESUMES):
            self.run.wait(what, happened, every_s)
            if self.run.driver.poll() is None:
                return
            self._go_on()
        raise LimitError(f"resumed {MAX_RESUMES} times while waiting for {what}")

    def _do(self, fault: Fault) -> None:
        if fault.target == "disk":
            self.disk.fill(self._writers)
            time.sleep(fault.seconds)
            self.disk.free(self._writers)
            return
        victim = next(iter(self.run.processes(fault.target)), None)
        if victim is None:
            return
        with contextlib.suppress(psutil.NoSuchProcess):
            if fault.action == "kill":
                self._gone.add(victim.pid)
                victim.kill()
            elif fault.action == "stop":
                victim.send_signal(signal.SIGTERM)
            elif fault.action == "hang":
                with _stopped(victim):
                    time.sleep(fault.seconds)
            elif fault.action == "slow":
                until = time.monotonic() + fault.seconds
                while time.monotonic() < until:
                    with _stopped(victim):
                        time.sleep(SLOW_CYCLE_S * SLOW_SHARE)
                    time.sleep(SLOW_CYCLE_S * (1 - SLOW_SHARE))
        if fault.ends_the_driver:
            self.run.wait(f"the driver's end after {fault.name}", lambda: False)

    def _writers(self) -> Iterator[psutil.Process]:
        """Who writes into the run's folder."""
        for role in ("driver", "learner", "predictor"):
            yield from self.run.processes(role)


@contextlib.contextmanager
def _stopped(process: psutil.Process) -> Iterator[None]:
    process.suspend()
    try:
        yield
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.resume()
