"""Play a quest: an immutable state, the commands that lead from one to the next, and what is answered to each.

No command raises: what a player did wrong is answered in words. `valid_commands` lists what would do something.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from envs.quest.world import Barrier, World

HELP = "write help for what you can do"
UNKNOWN_COMMAND = f"i do not know that ; {HELP}"
NO_WAY = "there is no way"
CLOSED = "the way is closed"
NOT_HERE = "that is not here"
NOT_HELD = "you do not hold that"
NO_USE = "nothing happens"
TAKEN, DROPPED, LIT, OPENED, ADDED = "taken", "dropped", "the lamp burns", "the way is open", "the witch stirs"
NOTHING = "nothing"
FELL, THROWN_OUT, POISONED = "you fall in the dark", "the guard throws you out", "the potion is poison"
ANSWERS = (
    *(UNKNOWN_COMMAND, NO_WAY, CLOSED, NOT_HERE, NOT_HELD, NO_USE, TAKEN, DROPPED, LIT, OPENED, ADDED, NOTHING),
    *(FELL, THROWN_OUT, POISONED, "you can", "you hold", "here", "unknown", "dark stairs who wants then"),
)
COMMANDS = ("go", "take", "drop", "use", "give", "add", "light", "look", "bag", "help")


@dataclass(frozen=True, slots=True)
class State:
    """Where a quest stands."""

    room: str
    """Where the player is."""
    seen: frozenset[str]
    """The rooms that the player has entered."""
    lying: Mapping[str, tuple[str, ...]]
    """Room → the things that lie there."""
    held: tuple[str, ...] = ()
    """The things that the player holds."""
    opened: int = 0
    """How many barriers of the line are open; they open in order."""
    added: int = 0
    """How many ingredients the witch has."""
    lit: bool = False
    """The lamp burns."""
    outcome: str = ""
    """Empty while the quest goes on, else what ended it: "won", or one of ANSWERS."""


def start(world: World) -> State:
    """Return the state in which a quest begins."""
    first = world.line[0]
    return State(first, frozenset([first]), {name: room.things for name, room in world.rooms.items()})


def describe(world: World, state: State) -> str:
    """Return what is seen of the room: exits in order, with barriers and known rooms; then what lies here."""
    barrier = _closed_barrier(world, state)
    exits = []
    for direction, to in world.rooms[state.room].exits.items():
        what = to if to in state.seen else "unknown"
        if barrier is not None and direction == world.way_on(state.room):
            what = barrier.sight
        exits.append(f"{direction} {what}")
    things = state.lying[state.room]
    here = f" ; here {' , '.join(things)}" if things else ""
    return f"{state.room} ; {' , '.join(exits)}{here}"


def obey(world: World, state: State, command: str) -> tuple[State, str]:
    """Return the next state and the answer. `command`: words between single blanks, lower case."""
    verb, _, rest = command.partition(" ")
    if verb in _VERBS and rest:
        return _VERBS[verb](world, state, rest)
    if command == "look":
        return state, describe(world, state)
    if command == "bag":
        return state, f"you hold {' , '.join(state.held) or NOTHING}"
    if command == "help":
        return state, f"you can {' , '.join(valid_commands(world, state))}"
    return state, UNKNOWN_COMMAND


def valid_commands(world: World, state: State) -> list[str]:
    """Return the commands that change something here, those that would end the quest included."""
    barrier = _closed_barrier(world, state)
    found = []
    for direction in world.rooms[state.room].exits:
        blocked = barrier is not None and direction == world.way_on(state.room)
        if not blocked or (barrier is not None and barrier.kind == "stairs"):
            found.append(f"go {direction}")
    found += [f"take {thing}" for thing in state.lying[state.room]]
    if barrier is not None and barrier.kind == "guard":
        found += [f"give {thing}" for thing in state.held]
    elif barrier is not None and barrier.kind == "witch":
        found += [f"add {thing}" for thing in state.held]
    elif barrier is not None and barrier.kind != "stairs" and barrier.needs[0] in state.held:
        found.append(f"use {barrier.needs[0]}")
    if "lamp" in state.held and not state.lit:
        found.append("light lamp")
    return [*found, *(f"drop {thing}" for thing in state.held)]


def progress(world: World, state: State) -> float:
    """Return the share of the way that is made: barriers that are open, and the treasure. 1 when the quest is won."""
    return (state.opened + (state.outcome == "won")) / (len(world.barriers) + 1)


def _closed_barrier(world: World, state: State) -> Barrier | None:
    """Return the barrier of the room where the player stands, unless it is open."""
    barrier = world.barrier_at(state.room)
    return barrier if barrier is not None and world.line.index(state.room) >= state.opened else None


def _go(world: World, state: State, direction: str) -> tuple[State, str]:
    to = world.rooms[state.room].exits.get(direction)
    if to is None:
        return state, NO_WAY
    barrier = _closed_barrier(world, state)
    if barrier is not None and direction == world.way_on(state.room):
        if barrier.kind != "stairs":
            return state, CLOSED
        if not state.lit:
            return replace(state, outcome=FELL), FELL
        state = replace(state, opened=state.opened + 1)
    state = replace(state, room=to, seen=state.seen | {to})
    return state, describe(world, state)


def _take(world: World, state: State, thing: str) -> tuple[State, str]:
    if thing not in state.lying[state.room]:
        return state, NOT_HERE
    left = tuple(other for other in state.lying[state.room] if other != thing)
    outcome = "won" if thing == world.treasure else ""
    held = (*state.held, thing)
    return replace(state, lying={**state.lying, state.room: left}, held=held, outcome=outcome), TAKEN


def _drop(world: World, state: State, thing: str) -> tuple[State, str]:
    if thing not in state.held:
        return state, NOT_HELD
    lying = {**state.lying, state.room: (*state.lying[state.room], thing)}
    return replace(_without(state, thing), lying=lying, lit=state.lit and thing != "lamp"), DROPPED


def _use(world: World, state: State, thing: str) -> tuple[State, str]:
    barrier = _closed_barrier(world, state)
    if thing not in state.held:
        return state, NOT_HELD
    if barrier is None or barrier.kind in ("stairs", "guard", "witch") or thing != barrier.needs[0]:
        return state, NO_USE
    return replace(_without(state, thing), opened=state.opened + 1), OPENED


def _give(world: World, state: State, thing: str) -> tuple[State, str]:
    barrier = _closed_barrier(world, state)
    if thing not in state.held:
        return state, NOT_HELD
    if barrier is None or barrier.kind != "guard":
        return state, NO_USE
    if thing != barrier.needs[0]:
        return replace(state, outcome=THROWN_OUT), THROWN_OUT
    return replace(_without(state, thing), opened=state.opened + 1), OPENED


def _add(world: World, state: State, thing: str) -> tuple[State, str]:
    barrier = _closed_barrier(world, state)
    if thing not in state.held:
        return state, NOT_HELD
    if barrier is None or barrier.kind != "witch":
        return state, NO_USE
    if thing != barrier.needs[state.added]:
        return replace(state, outcome=POISONED), POISONED
    state = replace(_without(state, thing), added=state.added + 1)
    if state.added < len(barrier.needs):
        return state, ADDED
    return replace(state, opened=state.opened + 1, added=0), OPENED


def _light(world: World, state: State, thing: str) -> tuple[State, str]:
    if thing != "lamp":
        return state, NO_USE
    if "lamp" not in state.held:
        return state, NOT_HELD
    return replace(state, lit=True), LIT


def _without(state: State, thing: str) -> State:
    return replace(state, held=tuple(other for other in state.held if other != thing))


_VERBS: Mapping[str, Callable[[World, State, str], tuple[State, str]]] = {
    "go": _go,
    "take": _take,
    "drop": _drop,
    "use": _use,
    "give": _give,
    "add": _add,
    "light": _light,
}
