"""A real MCP server for tests: a box of numbers, over standard streams or HTTP (argument: a port)."""

import random
import sys
import time

from mcp.server import MCPServer

server = MCPServer("box")
numbers: list[int] = []


@server.tool()
def put(number: int) -> str:
    """Put a number into the box."""
    numbers.append(number)
    return f"{len(numbers)} in the box"


@server.tool()
def total() -> str:
    """The sum of the box."""
    return str(sum(numbers))


@server.tool()
def dice() -> str:
    """Another answer each time."""
    return str(random.random())


@server.tool()
def nap() -> str:
    """Takes its time."""
    time.sleep(30)
    return "well rested"


@server.tool()
def speech() -> str:
    """Answers at length."""
    return "word " * 1000


@server.tool()
def leave() -> str:
    """Ends the server."""
    import os

    os._exit(1)


@server.tool()
def save() -> str:
    """A snapshot."""
    return ",".join(map(str, numbers))


@server.tool()
def restore(state: str) -> str:
    """Puts a snapshot back."""
    numbers[:] = [int(number) for number in state.split(",") if number]
    return "done"


if __name__ == "__main__":
    if len(sys.argv) > 1:
        server.run("streamable-http", port=int(sys.argv[1]))
    else:
        server.run()
