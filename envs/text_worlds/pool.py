"""Share a few simulators, each a process that plays one game at a time, among any number of rollouts and their forks.

A rollout's state is what it did: its actions, and what was answered. A simulator that stands where the rollout stands
goes on from there; any other starts the game anew and does the same actions again. So a fork costs nothing until it is
stepped, nothing waits for a rollout to end, and a simulator that dies takes no state along.

        rollout a: look, go north        simulator 1 stands at (game, look, go north)    ─► steps
        fork of a: look                  no simulator stands there                       ─► 2 is reset, looks, steps
"""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from trace_async.config import ConfigError
from trace_async.env import EnvError, ReplayDivergedError

T = TypeVar("T")
Game = tuple[str, int]
"""A game's name (task, or fold) and its number (variation, or seed)."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What a simulator answers."""

    text: str
    score: float
    """In [0, 1], so far."""
    done: bool = False
    """The game is over."""


class Simulator(Protocol):
    """One running simulator. Its methods block; whatever they raise is its breakdown."""

    def reset(self, game: Game) -> Seen:
        """Begin `game`, and return what is seen first."""
        ...

    def step(self, action: str) -> Seen:
        """Carry out one action."""
        ...

    def valid_actions(self) -> str:
        """Return, in words, what can be done now."""
        ...

    def close(self) -> None:
        """End the simulator's process."""
        ...


@dataclass(frozen=True, slots=True)
class Position:
    """Where a rollout stands: its game, and its actions with what was answered to each."""

    game: Game
    past: tuple[tuple[str, str], ...] = ()

    def after(self, action: str, seen: Seen) -> "Position":
        """Return the position to which `action` leads, when `seen` is the answer."""
        return Position(self.game, (*self.past, (action, seen.text)))


S = TypeVar("S", bound=Simulator)


@dataclass(slots=True, eq=False)
class _Seat(Generic[S]):
    simulator: S
    position: Position | None = None


@dataclass(eq=False)
class SimulatorPool(Generic[S]):
    """At most `size` simulators; another is started only when all that run are busy."""

    make: Callable[[], S]
    """Starts a simulator."""
    size: int
    """The most simulators that run at once, 1 to 64."""
    _idle: list[_Seat[S]] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        if not 1 <= self.size <= 64:
            raise ConfigError(f"env.args.num_simulators={self.size}: 1 to 64, each a process of about 300 MB")
        # As many threads as simulators: who has a thread has a simulator, so waiting is all in the executor's queue.
        self.threads = ThreadPoolExecutor(self.size, thread_name_prefix="simulator")

    def start(self, game: Game) -> Seen:
        """Return the first sight of a game. It blocks, so call it in `threads`, like the next two. Raises EnvError."""
        return self._with(Position(game), lambda seat: self._reset(seat, game))

    def step(self, position: Position, action: str) -> Seen:
        """Return what `action` brings after `position`. Raises EnvError; ReplayDivergedError if that cannot be."""

        def step(seat: _Seat[S]) -> Seen:
            self._go_to(seat, position)
            seat.position = None  # nowhere, should the step fail
            seen = seat.simulator.step(action)
            seat.position = position.after(action, seen)
            return seen

        return self._with(position, step)

    def valid_actions(self, position: Position) -> str:
        """Return the simulator's own words for what can be done there."""

        def ask(seat: _Seat[S]) -> str:
            self._go_to(seat, position)
            return seat.simulator.valid_actions()

        return self._with(position, ask)

    def ask(self, question: Callable[[S], T]) -> T:
        """Ask a simulator something else. For this it may leave the game that it plays."""

        def ask(seat: _Seat[S]) -> T:
            seat.position = None
            return question(seat.simulator)

        return self._with(None, ask)

    def ask_for_tasks(self, question: Callable[[S], T]) -> T:
        """Ask while tasks are listed. What goes wrong then is a setting or the machine, so this raises ConfigError."""
        try:
            return self.ask(question)
        except EnvError as error:
            raise ConfigError(f"env: {error}") from error

    def close(self) -> None:
        """End all simulators. They start again when they are needed."""
        with self._lock:
            seats, self._idle = self._idle, []
        for seat in seats:
            seat.simulator.close()

    def _with(self, position: Position | None, use: Callable[[_Seat[S]], T]) -> T:
        seat = self._take(position)
        try:
            answer = use(seat)
        except ReplayDivergedError:
            self._give_back(seat)
            raise
        except Exception as error:  # somebody else's program, over a socket: whatever it raises, it is not used again
            self._end(seat)
            raise EnvError(f"the simulator broke down: {type(error).__name__}: {error}") from error
        self._give_back(seat)
        return answer

    def _take(self, position: Position | None) -> _Seat[S]:
        """Return the idle simulator that stands at `position`, else the one that is idle longest, else a new one."""
        with self._lock:
            for seat in self._idle:
                if position is not None and seat.position == position:
                    self._idle.remove(seat)
                    return seat
            if self._idle:
                return self._idle.pop(0)
        try:
            return _Seat(self.make())
        except Exception as error:  # starting somebody else's program
            raise EnvError(f"the simulator cannot be started: {type(error).__name__}: {error}") from error

    def _give_back(self, seat: _Seat[S]) -> None:
        with self._lock:
            self._idle.append(seat)

    def _end(self, seat: _Seat[S]) -> None:
        try:
            seat.simulator.close()
        except Exception:  # noqa: BLE001 — it broke down already; that it cannot be closed either adds nothing
            return

    def _go_to(self, seat: _Seat[S], position: Position) -> None:
        if seat.position == position:
            return
        self._reset(seat, position.game)
        for number, (action, answer) in enumerate(position.past, 1):
            found = seat.simulator.step(action).text
            # The same words in another order are the same things, listed otherwise.
            if found != answer and sorted(found.split()) != sorted(answer.split()):
                seat.position = None
                raise ReplayDivergedError(
                    f"action {number}, {action!r}, brought {found[:80]!r} instead of {answer[:80]!r}"
                )
        seat.position = position

    def _reset(self, seat: _Seat[S], game: Game) -> Seen:
        seat.position = None
        seen = seat.simulator.reset(game)
        seat.position = Position(game)
        return seen
