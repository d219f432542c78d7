"""Do the engines say the same? Held-out tasks, greedy, from one policy, on each engine after the other.

    python -m scripts.bench.engine_parity --config configs/quickstart/multihop.yaml --backends torch,sglang,vllm

The first engine is the reference. A conversation may part where two tokens are equally likely up to rounding; so the
log-probability of either engine's choice is given there: a tie when they are equal, a fault when they are not. Tools
and verifier run as in training, without Ray.
"""

import argparse
import asyncio
import itertools
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from envs import load_domain
from scripts.start_policy import ensure_policy
from trace_async.config import Config, load_config
from trace_async.engines import make_engine
from trace_async.policy.load import load_renderer
from trace_async.rollout.grower import make_grower
from trace_async.trees.tree import RolloutTree
from trace_async.types import Completion, SamplingParams, Task

ENDED = (-1, math.nan)  # where one conversation has no more tokens


@dataclass(frozen=True, slots=True)
class Parting:
    """Where two conversations part: both engines' choices, by their log-probabilities (nan: it had ended)."""

    task_id: str
    ours: float
    theirs: float


@dataclass(frozen=True, slots=True)
class Parity:
    """`largest`: of |log-probability of one engine − of the other| over tokens before any parting."""

    num_tokens: int
    largest: float
    partings: tuple[Parting, ...]


async def greedy_trees(config: Config, policy_path: Path, log_dir: Path) -> list[RolloutTree]:
    """One rollout for each of `eval.num_tasks` held-out tasks."""
    domain = load_domain(config.env)
    renderer = load_renderer(policy_path, max_observation_tokens=config.sampling.max_observation_tokens)
    engine = make_engine(
        config.engine,
        policy_path=policy_path,
        max_context_tokens=config.sampling.max_context_tokens,
        seed=config.seed,
        log_dir=log_dir,
    )
    slots = asyncio.Semaphore(config.engine.max_running_requests)

    async def generate(task: Task, prompt_ids: Sequence[int], params: SamplingParams) -> Completion:
        return await engine.generate(prompt_ids, params)

    grower = make_grower(config, domain, renderer, generate, max_retries=0)
    try:
        await engine.start()

        async def grow(index: int) -> RolloutTree:
            async with slots:
                return await grower.grow(tasks[index], 1, temperature=0.0)

        tasks = domain.tasks("heldout")[: config.eval.num_tasks]
        return list(await asyncio.gather(*map(grow, range(len(tasks)))))
    finally:
        await engine.close()


def compare(ours: Sequence[RolloutTree], theirs: Sequence[RolloutTree]) -> Parity:
    """Turn by turn, token by token, up to where they part. ValueError when a conversation broke down."""
    num_tokens, largest, partings = 0, 0.0, []
    for mine, other in zip(ours, theirs, strict=True):
        if mine.failures or other.failures:
            raise ValueError(f"{mine.task.id}: {mine.failures or other.failures}")
        pairs = itertools.zip_longest(generated(mine), generated(other), fillvalue=ENDED)
        for (token, logprob), (other_token, other_logprob) in pairs:
            if token != other_token:
                partings.append(Parting(mine.task.id, logprob, other_logprob))
                break
            num_tokens += 1
            largest = max(largest, abs(logprob - other_logprob))
    return Parity(num_tokens, largest, tuple(partings))


def generated(tree: RolloutTree) -> list[tuple[int, float]]:
    """Return (token, log-probability) of all turns of a single rollout."""
    return [
        pair for node in tree.nodes for pair in zip(node.token_ids[: node.num_generated], node.logprobs, strict=True)
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--backends", type=lambda text: text.split(","), default=["torch", "sglang", "vllm"])
    parser.add_argument("overrides", nargs="*", metavar="section.name=value")
    args = parser.parse_args(arguments)
    config = load_config(args.config, args.overrides)
    policy_path = ensure_policy(config)
    reference: list[RolloutTree] = []
    with tempfile.TemporaryDirectory() as logs:
        for backend in args.backends:
            of_backend = replace(config, engine=replace(config.engine, backend=backend))
            trees = asyncio.run(greedy_trees(of_backend, policy_path, Path(logs)))
            reference = reference or trees
            parity = compare(reference, trees)
            success = sum(tree.rollouts[0].reward for tree in trees) / len(trees)
            print(
                f"{backend}: success {success:.1%} of {len(trees)}; {len(trees) - len(parity.partings)} conversations "
                f"are those of {args.backends[0]}, {parity.num_tokens} tokens alike, log-probabilities to "
                f"{parity.largest:.1e}",
                flush=True,
            )
            for parting in parity.partings:
                print(f"  {parting.task_id} parts: {parting.ours:.6f} there, {parting.theirs:.6f} here")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
