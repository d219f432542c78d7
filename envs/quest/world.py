"""Generate the worlds of quests: rooms in a line, each left through a barrier, with side rooms that hold what it needs.

        side room (red key)     side room (boot)
              │                       │
    start ── room ──[red door]── room ──[guard who wants bread]── … ── last room (crown)
                                  │
                            side room (gold, bread)

A routine barrier (door, vines, rubble, ice) forgives: a wrong try costs a turn. A crux (dark stairs, a guard, a witch)
does not: a wrong try ends the quest. Where the cruxes stand says how late a quest is decided, which is what makes
continuations worth their price or not (docs/METHOD.md).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from random import Random
from typing import Literal, cast

from trace_async.types import Json, Split

BarrierKind = Literal["door", "vines", "rubble", "ice", "stairs", "guard", "witch"]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ROOMS = _words(
    "hall kitchen cellar attic library chapel garden stable barn tower vault crypt cave mill forge pantry study "
    "gallery armory bakery brewery courtyard dungeon harbor lodge market nursery orchard parlor quarry"
)
COLOURS = _words("red blue green white black yellow")
TOOLS: Mapping[BarrierKind, str] = {"vines": "knife", "rubble": "shovel", "ice": "torch"}
ROUTINE: tuple[BarrierKind, ...] = ("door", "vines", "rubble", "ice")
CRUXES: tuple[BarrierKind, ...] = ("stairs", "guard", "witch")
WANTED = _words("bread wine cheese apple soup")
PRECIOUS = _words("gold silver ruby pearl amber")
INGREDIENTS = _words("moss salt ash honey root feather")
JUNK = _words("boot rope stone bucket")
TREASURES = _words("crown sword cup ring harp")
DIRECTIONS = ("north", "east", "south", "west")
OPPOSITE = {"north": "south", "south": "north", "east": "west", "west": "east"}

SHAPES: Mapping[str, tuple[str, ...]] = {
    "easy": ("rr",),
    "middle-early": ("crrr",),
    "middle-spread": ("crcr", "rcrc"),
    "middle-late": ("rrrc",),
    "hard": ("ccrcc", "crccc"),
}
"""Kind of quest: its barriers from the start, r for routine and c for a crux."""
KINDS = tuple(SHAPES)


@dataclass(frozen=True, slots=True)
class Barrier:
    """What closes the way out of a room of the line."""

    kind: BarrierKind
    needs: tuple[str, ...]
    """What has to be held, in the order in which it is used."""
    lure: str = ""
    """What a greedy traveller takes instead; only a guard has one."""

    @property
    def name(self) -> str:
        """Return what it is called in the quest's outline: `red door`, `guard`."""
        return f"{self.needs[0].split()[0]} door" if self.kind == "door" else self.kind

    @property
    def sight(self) -> str:
        """Return how it is seen from the room; a guard or a witch says what is wanted."""
        if self.kind == "guard":
            return f"guard who wants {self.needs[0]}"
        if self.kind == "witch":
            return f"witch who wants {self.needs[0]} then {self.needs[1]}"
        return "dark stairs" if self.kind == "stairs" else self.name


@dataclass(frozen=True, slots=True)
class Room:
    """One room of a world."""

    name: str
    exits: Mapping[str, str]
    """Direction → room, in the order in which they are seen."""
    things: tuple[str, ...]
    """What lies there at the start."""


@dataclass(frozen=True, slots=True)
class World:
    """The rooms, barriers and treasure of one quest. It never changes."""

    rooms: Mapping[str, Room]
    """Name → room."""
    line: tuple[str, ...]
    """Names of the rooms from the start to the treasure."""
    barriers: tuple[Barrier, ...]
    """`barriers[i]` closes the way from `line[i]` to `line[i + 1]`."""
    treasure: str
    """What lies in the last room; taking it wins."""

    @property
    def outline(self) -> str:
        """Return the names of the barriers, in order."""
        return " , ".join(barrier.name for barrier in self.barriers)

    def barrier_at(self, room: str) -> Barrier | None:
        """Return the barrier on the way out of `room`; None for a side room and the last one."""
        index = self.line.index(room) if room in self.line[:-1] else -1
        return self.barriers[index] if index >= 0 else None

    def way_on(self, room: str) -> str:
        """Return the direction that the barrier of `room` closes."""
        following = self.line[self.line.index(room) + 1]
        return next(direction for direction, to in self.rooms[room].exits.items() if to == following)


def make_world(kind: str, rng: Random) -> World:
    """Return a world for a quest of `kind` (one of KINDS)."""
    shape = rng.choice(SHAPES[kind])
    names = rng.sample(ROOMS, len(ROOMS))
    line = tuple(names[: len(shape) + 1])
    spare = iter(names[len(shape) + 1 :])
    treasure = rng.choice(TREASURES)
    barriers = _barriers(shape, rng)
    rooms: dict[str, Room] = {}
    came_from = ""
    for index, name in enumerate(line):
        free = [direction for direction in DIRECTIONS if direction != came_from]
        rng.shuffle(free)
        exits = {came_from: line[index - 1]} if came_from else {}
        things: list[str] = [treasure] if index == len(barriers) else []
        if index < len(barriers):
            ahead = free.pop()
            exits[ahead] = line[index + 1]
            for held in _side_rooms(barriers[index], rng):
                direction, side = free.pop(), next(spare)
                exits[direction] = side
                rooms[side] = Room(side, {OPPOSITE[direction]: name}, held)
            came_from = OPPOSITE[ahead]
        rooms[name] = Room(name, _shuffled(exits, rng), tuple(things))
    return World(rooms, line, barriers, treasure)


def _barriers(shape: str, rng: Random) -> tuple[Barrier, ...]:
    """Return one barrier for each letter. No door of a colour, tool, wish or ingredient comes twice."""
    # Stairs come once at most: a lamp that burns goes on burning, so they would be no crux again.
    cruxes = [*rng.sample(CRUXES, len(CRUXES)), *rng.sample(CRUXES[1:], len(CRUXES) - 1)]
    pools = {name: iter(rng.sample(pool, len(pool))) for name, pool in _POOLS.items()}
    used: set[BarrierKind] = set()
    made = []
    for letter in shape:
        if letter == "c":
            made.append(_crux(cruxes.pop(0), pools))
            continue
        kind = rng.choice([k for k in ROUTINE if k == "door" or k not in used])
        used.add(kind)
        made.append(Barrier(kind, (f"{next(pools['colour'])} key",) if kind == "door" else (TOOLS[kind],)))
    return tuple(made)


_POOLS = {"colour": COLOURS, "wanted": WANTED, "precious": PRECIOUS, "ingredient": INGREDIENTS}


def _crux(kind: BarrierKind, pools: Mapping[str, Iterator[str]]) -> Barrier:
    if kind == "stairs":
        return Barrier(kind, ("lamp",))
    if kind == "guard":
        return Barrier(kind, (next(pools["wanted"]),), next(pools["precious"]))
    return Barrier(kind, (next(pools["ingredient"]), next(pools["ingredient"])))


def _side_rooms(barrier: Barrier, rng: Random) -> list[tuple[str, ...]]:
    """Return what lies in the side rooms of a barrier's room: in one all that is needed, in a second one junk."""
    needed = [*barrier.needs, barrier.lure] if barrier.lure else [*barrier.needs]
    rng.shuffle(needed)
    sides = [tuple(needed)]
    if rng.random() < 0.3:
        sides.insert(rng.randrange(2), (rng.choice(JUNK),))
    return sides


def _shuffled(exits: Mapping[str, str], rng: Random) -> dict[str, str]:
    return dict(rng.sample(list(exits.items()), len(exits)))


def split_of(world: World) -> Split:
    """Return the split of a world. A quarter of all, by the hash of everything in them, is only ever held out."""
    digest = blake2b(repr(world_to_json(world)).encode(), digest_size=1).digest()[0]
    return "heldout" if digest < 64 else "train"


def world_to_json(world: World) -> dict[str, Json]:
    """Return the world in plain values, for a task's data."""
    return {
        "rooms": {name: {"exits": dict(room.exits), "things": list(room.things)} for name, room in world.rooms.items()},
        "line": list(world.line),
        "barriers": [{"kind": b.kind, "needs": list(b.needs), "lure": b.lure} for b in world.barriers],
        "treasure": world.treasure,
    }


def world_from_json(data: Mapping[str, Json]) -> World:
    """Return what `world_to_json` wrote."""
    rooms = cast(Mapping[str, Mapping[str, Json]], data["rooms"])
    barriers = cast(Sequence[Mapping[str, Json]], data["barriers"])
    return World(
        rooms={
            name: Room(name, cast(Mapping[str, str], room["exits"]), tuple(cast(list[str], room["things"])))
            for name, room in rooms.items()
        },
        line=tuple(cast(list[str], data["line"])),
        barriers=tuple(
            Barrier(cast(BarrierKind, b["kind"]), tuple(cast(list[str], b["needs"])), str(b["lure"])) for b in barriers
        ),
        treasure=str(data["treasure"]),
    )


def names() -> list[str]:
    """Return every name of a room, thing, barrier and direction."""
    things = [*WANTED, *PRECIOUS, *INGREDIENTS, *JUNK, *TREASURES, *TOOLS.values(), "lamp", "key"]
    return [*ROOMS, *COLOURS, *things, *ROUTINE, *CRUXES, *DIRECTIONS]
