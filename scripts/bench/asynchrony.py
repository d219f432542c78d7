"""What does it buy that nobody waits? Seconds for the same updates by `actors.max_staleness`, and with a barrier.

    python -m scripts.bench.asynchrony
    python -m scripts.bench.asynchrony --updates 40 --learner-share 0.5 --staleness 0,1,2,4,8

The real admission, books, PromptActors and router over simulated engines and tools, in virtual time
(scripts/bench/scale.py); the learner only takes its time. At most one update's worth of rollouts is under way in
every case, so that asynchrony is not given more of the engines' memory, and with it larger batches.

    barrier          synchronous, and Stage 2 begins in no prompt before the roots of all prompts have ended
    staleness 0      synchronous: an update waits for all its trees, the next one's start after it
    staleness s      trees may be trained on up to s updates after the weights that began them

`learner` is the seconds of an update, as a share of the seconds that the synchronous loop takes for its rollouts.
`speed` compares tokens a second with the synchronous loop.
"""

import argparse
import asyncio
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from actors.admission import Admission
from actors.generators.router import Generators
from actors.prompts.prompt import PromptActor
from scripts.bench.scale import Load, SimulatedGenerator, make_policy_folder, simulated_engine
from scripts.bench.virtual_time import run_in_virtual_time
from trace_async.config import Config, load_config
from trace_async.run.state import PendingPrompt
from trace_async.trees.tree import RolloutTree
from trace_async.types import PrefixQuery, Task
from trace_async.weights import WeightManifest, WeightUpdate

SHAPES = {
    "even": Load(turns=4, answer_sigma=0.05, tool_sigma=0.0),
    "long answers": Load(turns=4, answer_sigma=1.3, tool_sigma=0.0),
    "slow tools": Load(turns=4, answer_sigma=0.05, tool_sigma=1.8, tool_max_s=300.0),
}
"""How long turns take: all alike; answers with a heavy tail (one in a hundred is 20 times the median); tools with one
(one in a hundred takes over a minute)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One loop to be timed."""

    load: Load
    max_staleness: int
    learner_s: float
    """Seconds of an update."""
    barrier: bool = False
    """Stage 2 waits for the roots of all prompts under way."""


@dataclass(slots=True)
class Timed:
    """What a case took, after its first two updates."""

    seconds: float = 0.0
    """Of all updates that count."""
    waited_s: float = 0.0
    """Of these, the learner's for trees."""
    tokens: int = 0
    """Generated, of the trees that were trained on."""
    staleness: Counter[int] = field(default_factory=Counter)
    """Trees by how many versions their oldest token was behind."""
    engine_share: float = 0.0
    """Share of the whole run in which a generator has a request, on average."""


class Values:
    """In the predictor's place: V is .5 everywhere. With a barrier nobody is answered before all have asked."""

    def __init__(self, barrier: bool) -> None:
        self.barrier = barrier
        self.growing = 0
        self.asking = 0
        self.all_asked = asyncio.Event()

    async def values(self, queries: Sequence[PrefixQuery]) -> list[np.ndarray]:
        if self.barrier:
            self.asking += 1
            all_asked = self.all_asked
            self.look()
            await all_asked.wait()
        return [np.full(len(query.positions), 0.5) for query in queries]

    def look(self) -> None:
        """Lets all go on when every prompt that grows has asked."""
        if self.asking and self.asking == self.growing:
            self.all_asked.set()
            self.all_asked, self.asking = asyncio.Event(), 0


class Prompts:
    """Admission's `Prompts`: one PromptActor in this process."""

    def __init__(self, actor: PromptActor, values: Values) -> None:
        self.actor, self.values = actor, values

    async def run(self, ticket: int, prompt: PendingPrompt, task: Task) -> RolloutTree:
        self.values.growing += 1
        try:
            return await self.actor.run_prompt(task, prompt)
        finally:
            self.values.growing -= 1
            self.values.look()  # a prompt whose roots all end at once has nothing to ask

    async def prompt_queries(self, tasks: Sequence[Task]) -> list[Any]:
        raise AssertionError("uniform allocation asks for no values")

    async def measure(self, tasks: Sequence[Task], count: int) -> list[list[float]]:
        raise AssertionError("no oracle here")


class Unasked:
    """Admission's `Estimator`."""

    async def estimate(self, task_ids: Sequence[str], queries: Sequence[PrefixQuery]) -> Any:
        raise AssertionError("uniform allocation asks for no values")


def configure(args: argparse.Namespace, load: Load, max_staleness: int) -> Config:
    prompts = args.roots // 8
    return load_config(
        None,
        [
            "env.name=scripts.bench.scale:SimulatedTools",
            f"env.args={dict(num_tasks=args.updates * prompts, **asdict(load))}",
            f"budget.root_rollouts={args.roots}",
            f"budget.pool_size={prompts}",
            "budget.stage1=uniform",
            "budget.uniform_rollouts=8",
            "budget.max_rollouts=8",
            "budget.stage2=contrast",
            "budget.continuations_per_root=1",
            "predictor.trunk=own",
            "sampling.max_turn_tokens=8192",
            "sampling.max_context_tokens=32768",
            "sampling.max_observation_tokens=0",
            f"actors.max_staleness={max_staleness}",
            f"actors.prompts_per_actor={prompts}",
            "actors.tree_timeout_s=2000",
            f"num_updates={args.updates}",
        ],
    )


async def timed(args: argparse.Namespace, case: Case, policy: Path) -> Timed:
    """Makes `args.updates` updates."""
    config = configure(args, case.load, case.max_staleness)
    values = Values(case.barrier)
    actor = PromptActor(config, str(policy), values)  # type: ignore[arg-type]  # only its `values` is asked
    stop, vocab = actor.renderer.stop_token_ids[0], actor.renderer.vocab_size
    engines = [simulated_engine(i, case.load, stop, vocab, 0.0) for i in range(args.generators)]
    for engine in engines:
        await engine.start()
    handles: Any = {f"generator-{i}": SimulatedGenerator(engine) for i, engine in enumerate(engines)}
    await actor.announce(Generators(handles), {})
    clock = asyncio.get_running_loop().time
    admission = Admission(
        config, actor.domain.tasks("train"), Prompts(actor, values), Unasked(), Path("nowhere"), now=clock
    )
    running = asyncio.create_task(admission.run())
    result = Timed()

    async def updates() -> None:
        for number in range(args.updates):
            began, version = clock(), admission.state.policy_version
            trees = await admission.take()
            waited_s = clock() - began
            await asyncio.sleep(case.learner_s)
            manifest = WeightManifest(policy_version=version + 1, checksum=str(version + 1), num_tensors=0, num_bytes=0)
            await asyncio.gather(*(e.update_weights(WeightUpdate(manifest=manifest, tensors={})) for e in engines))
            admission.account(trees, updated=True)
            if number >= 2:  # before, the first trees are still on their way
                result.seconds += clock() - began
                result.waited_s += waited_s
                result.tokens += sum(tree.num_generated_tokens for tree in trees)
                result.staleness.update(version - tree.oldest_policy_version for tree in trees)

    done = asyncio.create_task(updates())
    await asyncio.wait([running, done], return_when=asyncio.FIRST_COMPLETED)
    if not done.done():
        running.result()
    done.result()
    running.cancel()
    result.engine_share = float(np.mean([engine.busy_s for engine in engines])) / clock()
    return result


def rows(args: argparse.Namespace, load: Load, policy: Path) -> list[tuple[str, Timed, float]]:
    """Name, what it took, and the share of the learner's seconds in which it waited; the synchronous loop first."""

    def run(max_staleness: int, learner_s: float, *, barrier: bool = False) -> Timed:
        case = Case(load=load, max_staleness=max_staleness, learner_s=learner_s, barrier=barrier)
        return run_in_virtual_time(timed(args, case, policy))

    alone = run(0, 0.0)
    learner_s = args.learner_share * alone.seconds / (args.updates - 2)
    cases = [("barrier", run(0, learner_s, barrier=True))]
    cases += [(f"staleness {s}", run(s, learner_s)) for s in args.staleness]
    return [(name, took, learner_s) for name, took in cases]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generators", type=int, default=4)
    parser.add_argument("--roots", type=int, default=256, help="root rollouts of an update, 8 a prompt")
    parser.add_argument("--updates", type=int, default=30)
    parser.add_argument("--learner-share", type=float, default=0.5)
    parser.add_argument("--staleness", type=lambda text: [int(s) for s in text.split(",")], default=[0, 1, 2, 4, 8])
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    print(
        f"{args.generators} generators, {args.roots} roots and as many continuations an update, {args.updates} updates"
    )
    with tempfile.TemporaryDirectory() as folder:
        policy = make_policy_folder(Path(folder))
        for shape, load in SHAPES.items():
            found = rows(args, load, policy)
            base = next(took for name, took, _ in found if name == "staleness 0")
            print(f"\n{shape}: an update of the learner takes {found[0][2]:.0f} s")
            print(
                f"{'':<14}{'s/update':>9}{'tokens/s':>10}{'speed':>7}{'learner waits':>15}{'engines busy':>14}"
                "  staleness"
            )
            for name, took, _ in found:
                trees = took.staleness.total()
                shown = "  ".join(f"{s}: {count / trees:.0%}" for s, count in sorted(took.staleness.items()))
                tokens_per_s = took.tokens / took.seconds
                print(
                    f"{name:<14}{took.seconds / (args.updates - 2):>9.1f}{tokens_per_s:>10.0f}"
                    f"{tokens_per_s * base.seconds / base.tokens:>6.2f}×{took.waited_s / took.seconds:>15.0%}"
                    f"{took.engine_share:>14.0%}  {shown}"
                )


if __name__ == "__main__":
    main()
