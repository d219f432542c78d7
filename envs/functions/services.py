"""Simulated services with state: files, tickets, travel, a vehicle.

Their state is plain JSON, their tools are functions on it, described by JSON schemas. What goes wrong in a call is a
ToolError, which the model reads; the state stays as it was.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypedDict, cast

from trace_async.types import Json


class Ticket(TypedDict):
    owner: str
    status: str
    priority: str


class Flight(TypedDict):
    origin: str
    goal: str
    fare: str


class Vehicle(TypedDict):
    doors: str
    engine: str
    heating: str


class ServicesState(TypedDict):
    """All services of one task. `folders`: files by folder; `booked`: flights by their number."""

    folders: dict[str, list[str]]
    tickets: dict[str, Ticket]
    flights: dict[str, Flight]
    booked: list[str]
    vehicle: Vehicle


class ToolError(Exception):
    """The call cannot be carried out; the text tells the model why."""


@dataclass(frozen=True, slots=True)
class Tool:
    """`parameters`: description by name; all are texts and required. `reads`: the call changes nothing."""

    name: str
    description: str
    parameters: Mapping[str, str]
    run: Callable[..., Json]
    reads: bool = False

    def schema(self) -> dict[str, Json]:
        """Return the tool in the form that chat templates take (OpenAI, Hermes, Qwen)."""
        properties: dict[str, Json] = {
            name: {"type": "string", "description": text} for name, text in self.parameters.items()
        }
        parameters: dict[str, Json] = {"type": "object", "properties": properties, "required": [*self.parameters]}
        function: dict[str, Json] = {
            "name": self.name,
            "description": self.description,
            "parameters": parameters,
        }
        return {"type": "function", "function": function}


def call_tool(state: ServicesState, name: str, arguments: Mapping[str, Json]) -> Json:
    """The result of one call; changes `state` where the call says so. Raises ToolError with the state unchanged."""
    tool = TOOLS.get(name)
    if tool is None:
        raise ToolError("there is no such tool")
    for given, value in arguments.items():
        if given not in tool.parameters:
            raise ToolError("unknown argument")
        if not isinstance(value, str):
            raise ToolError(f"argument {given} must be a text")
    for wanted in tool.parameters:
        if wanted not in arguments:
            raise ToolError(f"argument {wanted} is missing")
    return tool.run(state, **arguments)


def _folder(state: ServicesState, folder: str) -> list[str]:
    if folder not in state["folders"]:
        raise ToolError("no such folder")
    return state["folders"][folder]


def _folder_of(state: ServicesState, file: str) -> list[str]:
    for files in state["folders"].values():
        if file in files:
            return files
    raise ToolError("no such file")


def _find_file(state: ServicesState, file: str) -> Json:
    holder = _folder_of(state, file)
    return {"folder": next(name for name, files in state["folders"].items() if files is holder)}


def _list_files(state: ServicesState, folder: str) -> Json:
    return {"files": [*_folder(state, folder)]}


def _copy_file(state: ServicesState, file: str, to: str) -> Json:
    _folder_of(state, file)
    target = _folder(state, to)
    if file in target:
        raise ToolError("the file is there")
    target.append(file)
    return "ok"


def _move_file(state: ServicesState, file: str, to: str) -> Json:
    source = _folder_of(state, file)
    _copy_file(state, file, to)
    source.remove(file)
    return "ok"


def _delete_file(state: ServicesState, file: str) -> Json:
    _folder_of(state, file).remove(file)
    return "ok"


def _ticket(state: ServicesState, ticket: str) -> Ticket:
    if ticket not in state["tickets"]:
        raise ToolError("no such ticket")
    return state["tickets"][ticket]


def _list_tickets(state: ServicesState, owner: str) -> Json:
    return {"tickets": [number for number, ticket in state["tickets"].items() if ticket["owner"] == owner]}


def _show_ticket(state: ServicesState, ticket: str) -> Json:
    return cast(Json, {**_ticket(state, ticket)})


def _close_ticket(state: ServicesState, ticket: str) -> Json:
    _ticket(state, ticket)["status"] = "closed"
    return "ok"


def _assign_ticket(state: ServicesState, ticket: str, owner: str) -> Json:
    _ticket(state, ticket)["owner"] = owner
    return "ok"


def _set_priority(state: ServicesState, ticket: str, priority: str) -> Json:
    if priority not in ("low", "high"):
        raise ToolError("the priority is low or high")
    _ticket(state, ticket)["priority"] = priority
    return "ok"


def _search_flights(state: ServicesState, origin: str, goal: str) -> Json:
    return {
        "flights": [
            {"flight": number, "fare": flight["fare"]}
            for number, flight in state["flights"].items()
            if (flight["origin"], flight["goal"]) == (origin, goal)
        ]
    }


def _book_flight(state: ServicesState, flight: str) -> Json:
    if flight not in state["flights"]:
        raise ToolError("no such flight")
    if flight in state["booked"]:
        raise ToolError("the flight is booked")
    state["booked"].append(flight)
    return "ok"


def _cancel_flight(state: ServicesState, flight: str) -> Json:
    if flight not in state["booked"]:
        raise ToolError("the flight is not booked")
    state["booked"].remove(flight)
    return "ok"


def _set_doors(state: ServicesState, doors: str) -> Json:
    if doors not in ("locked", "open"):
        raise ToolError("doors are locked or open")
    state["vehicle"]["doors"] = doors
    return "ok"


def _start_engine(state: ServicesState) -> Json:
    if state["vehicle"]["doors"] != "locked":
        raise ToolError("the doors are open")
    state["vehicle"]["engine"] = "on"
    return "ok"


def _stop_engine(state: ServicesState) -> Json:
    state["vehicle"]["engine"] = "off"
    return "ok"


def _set_heating(state: ServicesState, heating: str) -> Json:
    if state["vehicle"]["engine"] != "on":
        raise ToolError("the engine is off")
    state["vehicle"]["heating"] = heating
    return "ok"


def _vehicle_status(state: ServicesState) -> Json:
    return cast(Json, {**state["vehicle"]})


_ALL_TOOLS = (
    Tool("find_file", "The folder that holds a file", {"file": "name of the file"}, _find_file, reads=True),
    Tool("list_files", "The files of a folder", {"folder": "name of the folder"}, _list_files, reads=True),
    Tool("copy_file", "Copy a file", {"file": "name of the file", "to": "folder to copy it to"}, _copy_file),
    Tool("move_file", "Move a file", {"file": "name of the file", "to": "folder to move it to"}, _move_file),
    Tool("delete_file", "Delete a file", {"file": "name of the file"}, _delete_file),
    Tool("list_tickets", "The tickets of a person", {"owner": "name of the person"}, _list_tickets, reads=True),
    Tool("show_ticket", "What is known of a ticket", {"ticket": "its number"}, _show_ticket, reads=True),
    Tool("close_ticket", "Close a ticket", {"ticket": "its number"}, _close_ticket),
    Tool("assign_ticket", "Give a ticket to a person", {"ticket": "its number", "owner": "the person"}, _assign_ticket),
    Tool("set_priority", "Set a ticket's priority", {"ticket": "its number", "priority": "low or high"}, _set_priority),
    Tool(
        "search_flights",
        "Flights from a city to a city, with their fares",
        {"origin": "city of departure", "goal": "city of arrival"},
        _search_flights,
        reads=True,
    ),
    Tool("book_flight", "Book a flight", {"flight": "its number"}, _book_flight),
    Tool("cancel_flight", "Cancel a booked flight", {"flight": "its number"}, _cancel_flight),
    Tool("set_doors", "Lock or open the doors", {"doors": "locked or open"}, _set_doors),
    Tool("start_engine", "Start the engine; the doors must be locked", {}, _start_engine),
    Tool("stop_engine", "Stop the engine", {}, _stop_engine),
    Tool("set_heating", "Set the heating; the engine must be on", {"heating": "low or high"}, _set_heating),
    Tool("vehicle_status", "State of doors, engine and heating", {}, _vehicle_status, reads=True),
)
TOOLS: Mapping[str, Tool] = {tool.name: tool for tool in _ALL_TOOLS}
ERRORS = (
    *(
        "there is no such tool",
        "unknown argument",
        "argument file must be a text",
        "argument file is missing",
        "no such folder",
    ),
    *("no such file", "the file is there", "no such ticket", "the priority is low or high", "no such flight"),
    *("the flight is booked", "the flight is not booked", "doors are locked or open", "the doors are open"),
    *("the engine is off",),
)
