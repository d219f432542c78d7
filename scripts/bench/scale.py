"""What would the loop do with 256 generators? The real prompt actors and router over simulated engines.

    python -m scripts.bench.scale --generators 256 --prompts 10000
    python -m scripts.bench.scale --generators 64 --prompts 2000 --routing bounded,alone,hashing,two_choices,round_robin

Engines and tools take the time that their latency models say, in virtual time and one process; what our own code costs
is real and measured in processor seconds. So the figures say two things: how busy the generators would be, if our code
took no time; and how many processor seconds our code needs for each of their seconds, which is how many cores it takes.

The limit: what the policy did not write itself, prompts and observations, must be prefilled once, where it is unique in
its tree. `prefill_over_limit` is how many times as much was prefilled.
"""

import argparse
import asyncio
import hashlib
import itertools
import pickle
import resource
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from actors.generators.router import GeneratorRouter, Generators, loads_of_others
from actors.prompts.prompt import PromptActor
from scripts.bench.virtual_time import run_in_virtual_time
from trace_async.config import Config, load_config
from trace_async.engines.simulated import LatencyModel, SimulatedEngine
from trace_async.policy.small_tokenizer import build_tokenizer
from trace_async.run.state import PendingPrompt
from trace_async.trees.tree import RolloutTree
from trace_async.types import Completion, Message, Prompt, SamplingParams, Split, StepResult, Task

WORDS = tuple(f"word{index}" for index in range(500))


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What an agent does: lengths in tokens (log-normal around the median), tools in seconds."""

    prompt_tokens: int = 400
    """Of every task."""
    turns: int = 4
    """At most; after each turn a rollout ends with probability 1/turns."""
    answer_median: int = 150
    """Tokens of a turn; the spread is `answer_sigma` of the logarithm."""
    answer_sigma: float = 0.8
    """Heavy tail: at .8 one turn in a hundred is 6.4 times the median."""
    observation_tokens: int = 200
    """Of every tool's answer."""
    tool_median_s: float = 1.0
    """Seconds of a tool, between `tool_min_s` and `tool_max_s`."""
    tool_sigma: float = 1.0
    """Spread of the logarithm of a tool's seconds."""
    tool_min_s: float = 0.5
    """No tool answers sooner."""
    tool_max_s: float = 20.0
    """Nor later."""


class SimulatedTools:
    """A domain whose tools only take time: `env.name=scripts.bench.scale:SimulatedTools`."""

    name = "simulated"

    def __init__(self, *, num_tasks: int = 1000, seed: int = 0, **load: Any) -> None:
        self.num_tasks, self.seed, self.load = num_tasks, seed, Load(**load)
        self.numbers = itertools.count()

    def tasks(self, split: Split) -> Sequence[Task]:
        ids = range(self.num_tasks) if split == "train" else range(self.num_tasks, self.num_tasks + 10)
        return [Task(id=f"{split}-{i}", domain=self.name, kind="simulated", data={"seed": self.seed + i}) for i in ids]

    def make_env(self, task: Task) -> "SimulatedEnv":
        return SimulatedEnv(task, self.load, self.numbers)


class SimulatedEnv:
    """One rollout: each step waits as its tool would."""

    def __init__(self, task: Task, load: Load, numbers: Iterator[int], turn: int = 0) -> None:
        self.task, self.load, self.numbers, self.turn = task, load, numbers, turn
        # Every rollout and every fork draws times and outcomes of its own.
        self.random = Random(next(numbers))

    async def init(self) -> Prompt:
        words = Random(self.task.id).choices(WORDS, k=self.load.prompt_tokens)
        return Prompt(messages=(Message(role="user", content=" ".join(words)),))

    async def step(self, action: str, *, truncated: bool = False) -> StepResult:
        load = self.load
        seconds = load.tool_median_s * np.exp(load.tool_sigma * self.random.gauss(0, 1))
        await asyncio.sleep(min(max(seconds, load.tool_min_s), load.tool_max_s))
        self.turn += 1
        if self.turn >= load.turns or self.random.random() < 1 / load.turns:
            return StepResult(done=True, reward=float(self.random.random() < 0.5))
        words = self.random.choices(WORDS, k=load.observation_tokens)
        return StepResult(messages=(Message(role="tool", content=" ".join(words)),))

    async def fork(self) -> "SimulatedEnv":
        return SimulatedEnv(self.task, self.load, self.numbers, self.turn)

    async def close(self) -> None: ...


@dataclass(slots=True)
class Meter:
    """Processor seconds spent inside `measured` blocks, none of which awaits."""

    seconds: float = 0.0

    @contextmanager
    def measured(self) -> Iterator[None]:
        start = time.process_time()
        try:
            yield
        finally:
            self.seconds += time.process_time() - start

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            with self.measured():
                return function(*arguments)

        return timed


class SimulatedGenerator:
    """What a prompt actor sees of a generator: `generate.remote`. Keeps which unique tokens it was asked about."""

    def __init__(self, engine: SimulatedEngine) -> None:
        self.engine = engine
        self.generate = self

    def remote(self, prompt_ids: tuple[int, ...], params: SamplingParams) -> asyncio.Future[Completion]:
        return asyncio.ensure_future(self._generate(prompt_ids, params))

    async def _generate(self, prompt_ids: tuple[int, ...], params: SamplingParams) -> Completion:
        return await self.engine.generate(prompt_ids, params)


class RoundRobin(GeneratorRouter):
    """Every request to the next generator in turn."""

    turn = 0

    def choose(self, key: str) -> str:
        RoundRobin.turn += 1
        names = list(self.generators)
        return names[RoundRobin.turn % len(names)]


class Hashing(GeneratorRouter):
    """A prompt to the generator of its hash, however loaded."""

    def first_choice(self, key: str, rollouts: int) -> str:
        return max(self.generators, key=lambda name: hashlib.blake2b(f"{key}|{name}".encode()).digest())


class TwoChoices(GeneratorRouter):
    """A prompt to the less loaded of two drawn at random (Mitzenmacher), by the loads that our own routing knows."""

    random = Random(0)

    def first_choice(self, key: str, rollouts: int) -> str:
        drawn = TwoChoices.random.choices(list(self.generators), k=2)
        return min(drawn, key=lambda name: self.loads[name] + self.loads_of_others.get(name, 0))


class Alone(GeneratorRouter):
    """Ours, without knowing what the other routers have."""

    def announce(self, generators: Mapping[str, Any], loads_of_others: Mapping[str, int] | None = None) -> None:
        super().announce(generators)


ROUTING: dict[str, type[GeneratorRouter]] = {
    "bounded": GeneratorRouter,
    "alone": Alone,
    "hashing": Hashing,
    "two_choices": TwoChoices,
    "round_robin": RoundRobin,
}


@dataclass(slots=True)
class Books:
    """What came of the prompts."""

    trees: int = 0
    rollouts: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    generated_tokens: int = 0
    read_tokens: int = 0
    message_bytes: int = 0

    def enter(self, tree: RolloutTree, size: int) -> None:
        self.trees += 1
        self.rollouts += len(tree.rollouts)
        self.failed.update(tree.failures)
        self.generated_tokens += tree.num_generated_tokens
        self.read_tokens += sum(len(node.token_ids) - node.num_generated for node in tree.nodes)
        self.message_bytes += size


def simulated_engine(index: int, load: Load, stop_token: int, vocab: int, failures: float) -> SimulatedEngine:
    """Return an engine like an 8B model on a GPU of its own, whose answers are random words of log-normal length."""
    rng = np.random.default_rng(index)

    def answer(prompt_ids: Sequence[int], params: SamplingParams) -> tuple[int, ...]:
        length = int(load.answer_median * np.exp(load.answer_sigma * rng.standard_normal()))
        length = max(2, min(length, params.max_new_tokens))
        return (*rng.integers(vocab // 2, vocab, size=length - 1).tolist(), stop_token)

    return SimulatedEngine(answer, latency=LatencyModel(), failure_rate=failures, seed=index)


class Simulation:
    """Prompt actors, generators and what came of them, under virtual time."""

    def __init__(self, args: argparse.Namespace, config: Config, policy: Path, routing: str) -> None:
        self.args, self.routing = args, routing
        self.engine_meter, self.driver_meter, self.books = Meter(), Meter(), Books()
        self.prompt_actors = [PromptActor(config, str(policy), None) for _ in range(args.prompt_actors)]
        renderer = self.prompt_actors[0].renderer
        self.engines = [
            simulated_engine(i, Load(), renderer.stop_token_ids[0], renderer.vocab_size, args.failure_rate)
            for i in range(args.generators)
        ]
        self.handles: Any = {f"generator-{i}": SimulatedGenerator(engine) for i, engine in enumerate(self.engines)}
        self.tasks = self.prompt_actors[0].domain.tasks("train")
        self.loads: list[Mapping[str, int]] = [{} for _ in self.prompt_actors]
        self.num_places = args.generators * args.requests_per_generator // args.rollouts
        self.places = asyncio.Semaphore(self.num_places)

    async def start(self) -> None:
        for engine in self.engines:
            for name in ("_catch_up", "_admit", "_finish_due", "_answer", "_completion", "_drop"):
                setattr(engine, name, _outermost(self.engine_meter, getattr(engine, name)))
            await engine.start()
        for actor in self.prompt_actors:
            kept = actor.router
            actor.router = ROUTING[self.routing](wait_s=kept.wait_s, max_retries=kept.max_retries)
        await self.announce()

    async def announce(self) -> None:
        others = loads_of_others(self.loads)
        answers = zip(self.prompt_actors, others, strict=True)
        self.loads = [await actor.announce(Generators(self.handles), load) for actor, load in answers]

    async def announce_again(self) -> None:
        """As the pool's watch does: a router leaves out a generator on which a request failed until then."""
        while True:
            await asyncio.sleep(2.0)
            await self.announce()

    async def grow(self, number: int) -> None:
        task = self.tasks[number]
        prompt = PendingPrompt(
            task_id=task.id, num_roots=self.args.rollouts, policy_version=0, root_value=0.5, seed=number
        )
        try:
            tree = await self.prompt_actors[number % len(self.prompt_actors)].run_prompt(task, prompt)
        finally:
            self.places.release()
        with self.driver_meter.measured():
            # What the object store does with it: pickled by the prompt actor, loaded by the driver.
            self.books.enter(pickle.loads(message := pickle.dumps(tree, protocol=5)), len(message))

    async def grow_all(self) -> list[float]:
        """Keep all places taken until every prompt has ended; each generator's busy share while prompts were left.

        The first prompts begin all at once and the last leave generators idle, as the ends of any run do, so the
        window opens when as many have ended as there are places, and closes before the last.
        """
        loop = asyncio.get_running_loop()
        running: set[asyncio.Task[None]] = set()
        begun, before = 0.0, [0.0] * len(self.engines)
        for number in range(self.args.prompts):
            await self.places.acquire()
            task = asyncio.create_task(self.grow(number))
            running.add(task)
            task.add_done_callback(running.discard)
            if number == 2 * self.num_places:
                begun, before = loop.time(), [engine.busy_s for engine in self.engines]
        window_s = loop.time() - begun
        busy = [(engine.busy_s - then) / window_s for engine, then in zip(self.engines, before, strict=True)]
        await asyncio.gather(*running)
        return busy


async def simulate(args: argparse.Namespace, config: Config, policy: Path, routing: str) -> dict[str, float]:
    """Keep `requests_per_generator` rollouts under way for each generator until all prompts are done; the figures."""
    simulation = Simulation(args, config, policy, routing)
    await simulation.start()
    watch = asyncio.create_task(simulation.announce_again())
    started_cpu = time.process_time()
    busy = await simulation.grow_all()
    watch.cancel()
    own_s = time.process_time() - started_cpu - simulation.engine_meter.seconds
    health = [await engine.health() for engine in simulation.engines]
    books, seconds = simulation.books, asyncio.get_running_loop().time()
    prompt_tokens = sum(h.prompt_tokens for h in health)
    cached_tokens = sum(h.cached_tokens for h in health)
    return {
        "busy_share": float(np.mean(busy)),
        "busy_share_min": float(np.min(busy)),
        "mean_batch": float(np.mean([engine.mean_batch for engine in simulation.engines])),
        "cached_share": cached_tokens / prompt_tokens,
        "prefill_over_limit": (prompt_tokens - cached_tokens) / books.read_tokens,
        "generated_tokens_per_s": books.generated_tokens / seconds,
        "rollouts": float(books.rollouts),
        "failed": float(sum(books.failed.values())),
        "virtual_hours": seconds / 3600,
        "own_cpu_ms_per_rollout": 1e3 * own_s / books.rollouts,
        "driver_cpu_ms_per_rollout": 1e3 * simulation.driver_meter.seconds / books.rollouts,
        "cores_for_our_code": own_s / seconds,
        "message_kib_per_rollout": books.message_bytes / 1024 / books.rollouts,
        "peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def _outermost(meter: Meter, function: Callable[..., Any]) -> Callable[..., Any]:
    """Metered, unless a metered call of the same meter is under way around it."""

    def call(*arguments: Any) -> Any:
        if _INSIDE:
            return function(*arguments)
        _INSIDE.append(True)
        try:
            with meter.measured():
                return function(*arguments)
        finally:
            _INSIDE.pop()

    return call


_INSIDE: list[bool] = []


def make_policy_folder(folder: Path) -> Path:
    """Tokenizer and a config: nobody loads a model here."""
    build_tokenizer(WORDS).save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "qwen3"}', encoding="utf-8")
    return folder


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generators", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=2000)
    parser.add_argument("--rollouts", type=int, default=8, help="root rollouts a prompt")
    parser.add_argument("--prompt-actors", type=int, default=8)
    parser.add_argument("--requests-per-generator", type=int, default=32, help="rollouts under way for each generator")
    parser.add_argument("--failure-rate", type=float, default=0.0)
    parser.add_argument("--routing", default="bounded", help=f"of {', '.join(ROUTING)}, separated by commas")
    args = parser.parse_args()
    places = args.generators * args.requests_per_generator // args.rollouts
    if args.prompts < 3 * places:
        parser.error(f"--prompts {args.prompts}: at least three times the {places} that are under way at a time")
    return args


def main() -> None:
    args = parse_arguments()
    with tempfile.TemporaryDirectory() as folder:
        policy = make_policy_folder(Path(folder))
        config = load_config(
            None,
            [
                "env.name=scripts.bench.scale:SimulatedTools",
                f"env.args={{num_tasks: {args.prompts}}}",
                "budget.stage2=random",
                "budget.continuations_per_root=1",
                "sampling.max_turn_tokens=1024",
                "sampling.max_context_tokens=8192",
                "sampling.max_observation_tokens=0",
                "actors.prompts_per_actor=100000",
            ],
        )
        rows = {name: run_in_virtual_time(simulate(args, config, policy, name)) for name in args.routing.split(",")}
    print(f"{args.generators} generators, {args.prompts} prompts of {args.rollouts} roots and as many continuations")
    print(f"{'':<28}" + "".join(f"{name:>14}" for name in rows))
    for figure in next(iter(rows.values())):
        print(f"{figure:<28}" + "".join(f"{row[figure]:>14.3f}" for row in rows.values()))


if __name__ == "__main__":
    main()
