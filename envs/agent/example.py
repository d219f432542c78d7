"""An agent with one tool, small enough for a policy that learns it on a laptop: follow signs from place to place.

The task: `{"start": "p3", "hops": 2, "signs": {"p3": "p7", "p7": "p1", …}, "answer": "p1"}`. The agent's tool `look`
reads the sign of a place. The domain generates its tasks and can demonstrate them, so that `make-policy` works; the
agent is any program that plays them: `follow` below, or one in a framework (`docs/agents/`).
"""

import json
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

import aiohttp

from envs.agent.domain import Agent
from envs.agent.verifier import Outcome
from trace_async.config import ConfigError
from trace_async.types import Json, Split, Task

NUM_PLACES = 12
INSTRUCTIONS = "follow the signs"
LOOK: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "the place that the sign at a place points to",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
    },
}


def question(task: Mapping[str, Any]) -> str:
    """Return the task as the agent is asked it."""
    return f"go {task['hops']} signs from {task['start']}"


def look(task: Mapping[str, Any], place: object) -> str:
    """Return the place that the sign at `place` points to; `nothing` where there is no such sign."""
    return str(task["signs"].get(place, "nothing"))


async def follow(task: Mapping[str, Any], base_url: str, api_key: str) -> str:
    """Be an agent in plain HTTP: ask the model, use the tool that it calls, return its words."""
    messages: list[Any] = [{"role": "system", "content": INSTRUCTIONS}, {"role": "user", "content": question(task)}]
    async with aiohttp.ClientSession(headers={"authorization": f"Bearer {api_key}"}) as client:
        while True:
            body = {"model": "policy", "messages": messages, "tools": [LOOK]}
            async with client.post(f"{base_url}/chat/completions", json=body) as response:
                response.raise_for_status()
                message = (await response.json())["choices"][0]["message"]
            messages.append(message)
            if not message.get("tool_calls"):
                return str(message["content"])
            for call in message["tool_calls"]:
                place = json.loads(call["function"]["arguments"]).get("place")
                messages.append({"role": "tool", "tool_call_id": call["id"], "content": look(task, place)})


def arrived(task: Mapping[str, Any], outcome: Outcome) -> bool:
    """Judge an outcome: the last word must name the right place."""
    return str(outcome.result).split()[-1:] == [task["answer"]]


def make_task(rng: Random) -> dict[str, Json]:
    """Draw a task: where each sign points to, a start, and one to four hops."""
    places = [f"p{number}" for number in range(NUM_PLACES)]
    signs = dict(zip(places, rng.sample(places, NUM_PLACES), strict=True))
    start = place = rng.choice(places)
    hops = rng.randint(1, 4)
    for _ in range(hops):
        place = signs[place]
    return {"start": start, "hops": hops, "signs": dict(signs), "answer": place}


class Follow(Agent):
    """The domain of the example: `num_train` tasks and `num_heldout` others, drawn from `seed`.

    `miscount_rate`: the chance that a demonstration goes a hop too few (but never fewer than one) or too many.
    `final_tool`: the tool whose call is the answer, where the agent's framework takes no words for one (smolagents:
    `final_answer`). `settings`: whatever else `Agent` takes.
    """

    name = "follow"

    def __init__(
        self,
        *,
        num_train: int = 500,
        num_heldout: int = 100,
        seed: int = 0,
        miscount_rate: float = 0.5,
        final_tool: str = "",
        agent: str = "",
        command: Sequence[str] = (),
        **settings: Any,
    ) -> None:
        if not 0 <= miscount_rate <= 1:
            raise ConfigError(f"env.args.miscount_rate={miscount_rate}: between 0 and 1")
        self._miscount_rate = miscount_rate
        self._final_tool = final_tool
        self._sizes = {"train": num_train, "heldout": num_heldout}
        self._seed = seed
        if not command:
            agent = agent or "envs.agent.example:follow"
        verifier = "envs.agent.example:arrived"
        super().__init__(tasks="", verifier=verifier, agent=agent, command=command, **settings)

    def _read_split(self, tasks: str, heldout: str, num_heldout: int) -> dict[Split, list[Task]]:
        return {"train": self._made("train"), "heldout": self._made("heldout")}

    def _made(self, split: Split) -> list[Task]:
        rows = [make_task(Random(f"{self._seed}-{split}-{index}")) for index in range(self._sizes[split])]
        return [
            Task(id=f"{split}-{index}", domain=self.name, kind=f"{row['hops']}-hops", data=row)
            for index, row in enumerate(rows)
        ]

    def demonstrate(self, task: Task, rng: Random) -> Sequence[str]:
        """Return the turns of a player that looks from place to place, sometimes a hop too few or too many."""
        data: dict[str, Any] = dict(task.data)
        hops = data["hops"]
        if rng.random() < self._miscount_rate:
            hops = max(1, hops + rng.choice([-1, 1]))
        place, turns = data["start"], []
        for _ in range(hops):
            turns.append(_call("look", place=place))
            place = data["signs"][place]
        return [*turns, _call(self._final_tool, answer=place) if self._final_tool else f"at {place}"]

    def vocabulary(self) -> Sequence[str]:
        places = [form for number in range(NUM_PLACES) for form in (f" p{number}", f"p{number}", f' "p{number}"')]
        said = f"{INSTRUCTIONS} go signs from at nothing 1 2 3 4 look place ; [ cut ]"
        calls = [_call("look", place="p1")]
        if self._final_tool:
            calls.append(_call(self._final_tool, answer="p1"))
        return [*places, *said.split(), *calls]


def _call(name: str, **arguments: str) -> str:
    """Return a tool call as the policy writes it."""
    return f"<tool_call> {json.dumps({'name': name, 'arguments': arguments})} </tool_call>"
