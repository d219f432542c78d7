"""Show how quests are solved, imperfectly on purpose, to warm-start a small policy.

The player knows only what it has seen. Its missteps at cruxes are systematic: made more often than not, in situations
that can be recognised, so that greedy decoding makes them too and they are what the verifier has to unlearn.
"""

from dataclasses import dataclass
from random import Random

from envs.quest import game
from envs.quest.world import Barrier, World


@dataclass(frozen=True, slots=True, kw_only=True)
class Habits:
    """How a demonstrating player errs."""

    misstep: float = 0.0
    """Chance, at each crux, to go down unlit, to bring the guard what is precious, or to add the last first."""
    dawdle: float = 0.0
    """Chance, in each room that is entered, of a turn that brings nothing."""


def demonstrate(world: World, habits: Habits, rng: Random) -> list[str]:
    """Return the commands of one quest up to its end, won or lost."""
    return _Player(world, habits, rng).play()


class _Player:
    def __init__(self, world: World, habits: Habits, rng: Random) -> None:
        self.world, self.habits, self.rng = world, habits, rng
        self.state = game.start(world)
        self.commands: list[str] = []

    def play(self) -> list[str]:
        for room, barrier in zip(self.world.line, self.world.barriers, strict=False):
            errs = barrier.kind in ("stairs", "guard", "witch") and self.rng.random() < self.habits.misstep
            self._fetch(room, barrier, errs)
            for command in _dealing_with(barrier, errs):
                self._do(command)
            if self.state.outcome:
                return self.commands
            self._go(self.world.way_on(room))
            if self.state.outcome:
                return self.commands
        self._do(f"take {self.world.treasure}")
        return self.commands

    def _fetch(self, room: str, barrier: Barrier, errs: bool) -> None:
        """Look for what the barrier needs in the side rooms, in any order, and come back with it."""
        wanted = [barrier.lure] if errs and barrier.lure else [*barrier.needs]
        line = self.world.line
        sides = [d for d, to in self.world.rooms[room].exits.items() if to not in line]
        self.rng.shuffle(sides)
        for direction in sides:
            self._go(direction)
            side = self.state.room
            for thing in self.state.lying[side]:
                if thing in wanted:
                    self._do(f"take {thing}")
            self._go(next(iter(self.world.rooms[side].exits)))
            if all(thing in self.state.held for thing in wanted):
                return

    def _go(self, direction: str) -> None:
        self._do(f"go {direction}")
        if not self.state.outcome and self.rng.random() < self.habits.dawdle:
            self._do(self.rng.choice(("look", "bag")))

    def _do(self, command: str) -> None:
        self.state, _ = game.obey(self.world, self.state, command)
        self.commands.append(command)


def _dealing_with(barrier: Barrier, errs: bool) -> list[str]:
    """Return the commands that open a barrier for who holds what it needs, or the misstep there."""
    first = barrier.needs[0]
    if barrier.kind == "stairs":
        return [] if errs else ["light lamp"]
    if barrier.kind == "guard":
        return [f"give {barrier.lure if errs else first}"]
    if barrier.kind == "witch":
        return [f"add {barrier.needs[1]}"] if errs else [f"add {thing}" for thing in barrier.needs]
    return [f"use {first}"]
