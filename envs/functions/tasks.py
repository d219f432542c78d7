"""Generated function-calling tasks of graded difficulty: a state of the services, requests of a user, the right calls.

Some requests are misread systematically in the demonstrations (a back-up is made by moving, a changed booking keeps the
old flight), so that a small policy warm-started on them can learn something from the verifier.
"""

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from random import Random
from typing import Literal, cast, get_args

from envs.functions.services import TOOLS, ServicesState, ToolError, call_tool
from trace_async.types import Json

Level = Literal["easy", "middle", "hard"]
LEVELS: tuple[Level, ...] = get_args(Level)

FILES = ("report", "notes", "budget", "plan", "photo", "draft", "letter", "invoice", "paper", "slides", "poem", "menu")
FOLDERS = ("desk", "office", "home", "music", "school", "backup")
PEOPLE = ("ann", "ben", "cara", "dan", "eva", "finn", "gina", "hugo")
CITIES = ("rome", "oslo", "paris", "lima", "cairo", "delhi", "tokyo", "quito")
FARES = ("saver", "flex", "first")
TICKETS = tuple(f"t{number}" for number in range(1, 13))
FLIGHTS = tuple(f"f{number}" for number in range(1, 13))

Call = tuple[str, dict[str, str]]


@dataclass(frozen=True, slots=True)
class Request:
    """One request of the user."""

    text: str
    """What the user says."""
    calls: tuple[Call, ...]
    """The calls that fulfil it."""
    misread: tuple[Call, ...] = ()
    """The calls of a systematic misreading; empty: nobody misreads it."""


def random_state(rng: Random) -> ServicesState:
    folders: dict[str, list[str]] = {folder: [] for folder in FOLDERS}
    for file in rng.sample(FILES, 8):
        folders[rng.choice(FOLDERS[:-1])].append(file)
    numbers = rng.sample(TICKETS, 8)
    flights = rng.sample(FLIGHTS, 10)
    routes = [(origin, rng.choice([city for city in CITIES if city != origin])) for origin in rng.sample(CITIES, 4)]
    fares = [rng.sample(FARES, len(FARES)) for _ in routes]
    state: ServicesState = {
        "folders": folders,
        "tickets": {
            number: {"owner": rng.choice(PEOPLE), "status": "open", "priority": rng.choice(("low", "high"))}
            for number in numbers
        },
        "flights": {
            number: {"origin": routes[i % 4][0], "goal": routes[i % 4][1], "fare": fares[i % 4][i // 4]}
            for i, number in enumerate(flights)
        },
        "booked": rng.sample(flights, 2),
        "vehicle": {"doors": "open", "engine": "off", "heating": "low"},
    }
    return state


def _any_file(state: ServicesState, rng: Random) -> str:
    return rng.choice([file for files in state["folders"].values() for file in files])


def _move(state: ServicesState, rng: Random) -> Request:
    file = _any_file(state, rng)
    folder = rng.choice([name for name, files in state["folders"].items() if file not in files])
    return Request(f'move the file "{file}" to "{folder}"', (("move_file", {"file": file, "to": folder}),))


def _delete(state: ServicesState, rng: Random) -> Request:
    file = _any_file(state, rng)
    return Request(f'delete the file "{file}"', (("delete_file", {"file": file}),))


def _where(state: ServicesState, rng: Random) -> Request:
    file = _any_file(state, rng)
    return Request(f'where is the file "{file}" ?', (("find_file", {"file": file}),))


def _back_up(state: ServicesState, rng: Random) -> Request:
    file = _any_file(state, rng)
    arguments = {"file": file, "to": "backup"}
    return Request(f'back up the file "{file}"', (("copy_file", arguments),), (("move_file", arguments),))


def _clear(state: ServicesState, rng: Random) -> Request:
    folder = rng.choice([name for name, files in state["folders"].items() if files])
    listing: Call = ("list_files", {"folder": folder})
    deletions: list[Call] = [("delete_file", {"file": file}) for file in state["folders"][folder]]
    return Request(f'clear the folder "{folder}"', (listing, *deletions), (listing, deletions[0]))


def _close(state: ServicesState, rng: Random) -> Request:
    ticket = rng.choice([*state["tickets"]])
    return Request(f'close the ticket "{ticket}"', (("close_ticket", {"ticket": ticket}),))


def _give(state: ServicesState, rng: Random) -> Request:
    ticket, owner = rng.choice([*state["tickets"]]), rng.choice(PEOPLE)
    return Request(f'give the ticket "{ticket}" to "{owner}"', (("assign_ticket", {"ticket": ticket, "owner": owner}),))


def _escalate(state: ServicesState, rng: Random) -> Request:
    ticket = rng.choice([*state["tickets"]])
    right: Call = ("set_priority", {"ticket": ticket, "priority": "high"})
    return Request(f'escalate the ticket "{ticket}"', (right,), (("close_ticket", {"ticket": ticket}),))


def _close_all(state: ServicesState, rng: Random) -> Request:
    owner = rng.choice([ticket["owner"] for ticket in state["tickets"].values()])
    listing: Call = ("list_tickets", {"owner": owner})
    owned = [number for number, ticket in state["tickets"].items() if ticket["owner"] == owner]
    closing: list[Call] = [("close_ticket", {"ticket": number}) for number in owned]
    return Request(f'close all tickets of "{owner}"', (listing, *closing), (listing, closing[0]))


def _book(state: ServicesState, rng: Random) -> Request:
    flight = rng.choice([number for number in state["flights"] if number not in state["booked"]])
    return Request(f'book the flight "{flight}"', (("book_flight", {"flight": flight}),))


def _change(state: ServicesState, rng: Random) -> Request:
    new = rng.choice([number for number in state["flights"] if number not in state["booked"]])
    old = rng.choice(state["booked"])
    booking: Call = ("book_flight", {"flight": new})
    calls = (booking, ("cancel_flight", {"flight": old}))
    return Request(f'change the flight "{old}" to "{new}"', calls, (booking,))


def _book_by_fare(state: ServicesState, rng: Random) -> Request:
    number = rng.choice([number for number in state["flights"] if number not in state["booked"]])
    flight = state["flights"][number]
    route = {"origin": flight["origin"], "goal": flight["goal"]}
    listing: Call = ("search_flights", route)
    same_route = [n for n, other in state["flights"].items() if (other["origin"], other["goal"]) == (*route.values(),)]
    first = next((n for n in same_route if n not in state["booked"]), number)
    text = f'book a "{flight["fare"]}" flight from "{flight["origin"]}" to "{flight["goal"]}"'
    misread = (listing, ("book_flight", {"flight": first}))
    return Request(text, (listing, ("book_flight", {"flight": number})), misread)


def _lock(state: ServicesState, rng: Random) -> Request:
    doors = "open" if state["vehicle"]["doors"] == "locked" else "locked"
    return Request(f"{'open' if doors == 'open' else 'lock'} the doors", (("set_doors", {"doors": doors}),))


def _start(state: ServicesState, rng: Random) -> Request:
    calls: tuple[Call, ...] = (("set_doors", {"doors": "locked"}), ("start_engine", {}))
    return Request("start the car", calls, (("start_engine", {}),))


def _warm(state: ServicesState, rng: Random) -> Request:
    begin: tuple[Call, ...] = (("set_doors", {"doors": "locked"}), ("start_engine", {}))
    high: Call = ("set_heating", {"heating": "high"})
    return Request("warm up the car", (*begin, high), begin)


Maker = Callable[[ServicesState, Random], Request]
_PLAIN: tuple[Maker, ...] = (_move, _delete, _where, _close, _give, _book, _lock)
_TRICKY: tuple[Maker, ...] = (_back_up, _escalate, _change, _start, _book_by_fare, _warm, _close_all, _clear)
_SHAPES: Mapping[Level, tuple[tuple[int, int], ...]] = {  # how many (plain, tricky) requests
    "easy": ((1, 0), (2, 0)),
    "middle": ((0, 1), (1, 1), (0, 2)),
    "hard": ((0, 4), (1, 3), (1, 4)),
}


def make_task(level: Level, rng: Random) -> dict[str, Json]:
    """`state`: at the start; `requests`, and for each of them `calls` and `misread`, as [name, arguments] lists."""
    state = random_state(rng)
    start = deepcopy(state)
    num_plain, num_tricky = rng.choice(_SHAPES[level])
    makers = [*rng.choices(_PLAIN, k=num_plain), *rng.sample(_TRICKY, num_tricky)]
    rng.shuffle(makers)
    requests: list[Request] = []
    while len(requests) < len(makers):
        request = makers[len(requests)](state, rng)
        trial = deepcopy(state)
        if _runs(trial, request.calls) and request.text not in [other.text for other in requests]:
            requests.append(request)
            state = trial
        elif rng.random() < 0.1:  # this state does not allow the request; start anew
            return make_task(level, rng)
    return cast(
        dict[str, Json],
        {
            "state": start,
            "requests": [request.text for request in requests],
            "calls": [[[*call] for call in request.calls] for request in requests],
            "misread": [[[*call] for call in request.misread] for request in requests],
        },
    )


def _runs(state: ServicesState, calls: tuple[Call, ...]) -> bool:
    """Carries the calls out on `state`; False where one of them fails."""
    try:
        for name, arguments in calls:
            call_tool(state, name, arguments)
    except ToolError:
        return False
    return True


def words() -> list[str]:
    """Return every word of requests, calls and results."""
    names = [*FILES, *FOLDERS, *PEOPLE, *CITIES, *FARES, *TICKETS, *FLIGHTS, *TOOLS]
    names += ["name", "arguments", "files", "folder", "tickets", "flights", "flight", "fare", "error", "ok"]
    names += ["owner", "status", "priority", "open", "closed", "locked", "low", "high", "on", "off"]
    names += ["doors", "engine", "heating", *(parameter for tool in TOOLS.values() for parameter in tool.parameters)]
    texts = "move delete where is the file to ? back up clear the folder close give escalate ticket all tickets of "
    texts += "book flight change a from open lock doors start warm car"
    return [
        *(f'"{name}" {{"{name}"' for name in dict.fromkeys(names)),
        *texts.split(),
        '{"a": [ ], {}}} {} [ {"a"} ] , :',
    ]
