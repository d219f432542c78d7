"""Where the next turn goes on when it does not follow the last one: the node of context that leads to it.

after = k, nothing followed turn k yet      its tokens go on from turn k
after = k, something else followed turn k   a copy of all before it: a node's tokens cannot be parted
prompt                                      a conversation of its own; asked again, it goes on from the first one
"""

from collections.abc import Sequence
from typing import NamedTuple

from trace_async.env import EnvValueError
from trace_async.rollout.renderer import Renderer
from trace_async.trees.builder import tokens_before
from trace_async.trees.tree import ROOT, Node
from trace_async.types import StepResult


class Context(NamedTuple):
    """The node of context that leads to the next turn."""

    follows: int
    """The depth on the line after which the tokens go on, or -1: they begin a conversation."""
    token_ids: tuple[int, ...]
    """What comes between there and the turn."""


def place_context(line: Sequence[Node], result: StepResult, renderer: Renderer) -> Context:
    """Return the context that `result` asks for. `line`: the nodes of the rollout, by depth.

    Raises EnvValueError when there is no turn `result.after`.
    """
    if result.prompt is not None:
        tokens = renderer.render_prompt(result.prompt)
        for depth, node in enumerate(line):
            if node.token_ids == tokens and (depth == ROOT or node.follows == -1):
                return Context(depth, ())
        return Context(-1, tokens)
    turns = [depth for depth, node in enumerate(line) if depth != ROOT and node.follows is None]
    if result.after is None or not 0 <= result.after < len(turns):
        raise EnvValueError(f"the observation follows turn {result.after} of {len(turns)}")
    depth = turns[result.after]
    turn = line[depth]
    written = turn.token_ids[: turn.num_generated]
    ended = bool(written) and written[-1] in renderer.stop_token_ids
    observed = renderer.render_observation(result.messages, turn_ended=ended)
    if turn.token_ids == written:
        return Context(depth, observed)
    before = tokens_before(line, depth)
    return Context(-1, (*before[: len(before) - len(turn.token_ids)], *written, *observed))
