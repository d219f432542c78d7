"""Where continuations should pay with a policy as it stands: ρ and s by depth, kind by kind.

    python -m scripts.studies.continuation configs/quickstart/quest.yaml [--policy RUN/policy] [--kind middle-late]

Every task gets `--roots` root rollouts and from each `--forks` continuations at turns drawn at random.
"""

import argparse
import asyncio
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from envs import load_domain
from scripts.start_policy import ensure_policy
from scripts.studies.prefixes import Depth, decided_by_depth
from trace_async.config import Config, load_config
from trace_async.engines import make_engine
from trace_async.method.anchors import Anchor
from trace_async.policy.load import load_tokenizer
from trace_async.rollout.expansion import Expansion
from trace_async.rollout.grower import make_grower
from trace_async.rollout.renderer import Renderer
from trace_async.trees.tree import RolloutTree
from trace_async.types import Completion, SamplingParams, Task

AT_ONCE = 16  # prompts under way


async def grow(config: Config, policy: Path, tasks: Sequence[Task], roots: int, forks: int) -> list[RolloutTree]:
    """Return the trees of `tasks`, grown by the standing policy in `policy`."""
    rng = np.random.default_rng(config.seed)

    def plan(anchors: Sequence[Anchor], budget: int) -> np.ndarray:
        counts = np.zeros(len(anchors), dtype=int)
        counts[rng.choice(len(anchors), min(budget, len(anchors)), replace=False)] = 1
        return counts

    with tempfile.TemporaryDirectory() as logs:
        engine = make_engine(
            config.engine,
            policy_path=policy,
            max_context_tokens=config.sampling.max_context_tokens,
            seed=config.seed,
            log_dir=Path(logs),
        )

        async def generate(task: Task, prompt_ids: tuple[int, ...], params: SamplingParams) -> Completion:
            return await engine.generate(prompt_ids, params)

        renderer = Renderer(load_tokenizer(policy), max_observation_tokens=config.sampling.max_observation_tokens)
        grower = make_grower(config, load_domain(config.env), renderer, generate)
        slots = asyncio.Semaphore(AT_ONCE)

        async def one(task: Task) -> RolloutTree:
            async with slots:
                return await grower.grow(task, roots, Expansion(plan=plan, per_root=forks))

        await engine.start()
        try:
            return list(await asyncio.gather(*map(one, tasks)))
        finally:
            await engine.close()


def report(kind: str, trees: Sequence[RolloutTree], depths: Sequence[Depth], min_pairs: int) -> str:
    rewards = [[r.reward for r in tree.rollouts if r.kind == "root"] for tree in trees]
    both = np.mean([min(own) < max(own) for own in rewards if own])
    turns = np.mean([tree.depths[r.leaf] for tree in trees for r in tree.rollouts if r.kind == "root"])
    lines = [
        f"{kind}: {len(trees)} tasks × {len(rewards[0])} roots, success {np.mean(np.concatenate(rewards)):.3f}, "
        f"both outcomes {both:.3f}, {turns:.1f} turns",
        "| depth | pairs | success | ρ | 2ρ/(1+ρ) | s generated | s tokens | s turns | pays in tokens, turns |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for d in depths:
        if d.pairs >= min_pairs:
            shares = (d.share_generated, d.share_turns)
            pays = " ".join("yes" if s > d.threshold else "no" for s in shares) if math.isfinite(d.rho) else "–"
            lines.append(
                f"| {d.depth} | {d.pairs} | {d.success:.2f} | {d.rho:.2f} | {d.threshold:.2f} "
                f"| {d.share_generated:.2f} | {d.share_tokens:.2f} | {d.share_turns:.2f} | {pays} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--policy", type=Path, help="Hugging Face directory; by default the start policy")
    parser.add_argument("--kind", nargs="*", help="kinds of task; by default all that are held out")
    parser.add_argument("--tasks", type=int, default=24, help="of each kind")
    parser.add_argument("--roots", type=int, default=8)
    parser.add_argument("--forks", type=int, default=4, help="continuations for each root rollout")
    parser.add_argument("--width", type=int, default=4, help="so many depths are taken together")
    parser.add_argument("--min-pairs", type=int, default=24, help="depths with fewer are not shown")
    parser.add_argument("overrides", nargs="*", metavar="section.name=value")
    args, rest = parser.parse_known_args()
    torch.set_num_threads(1)
    config = load_config(args.config, [*args.overrides, *rest])
    policy = args.policy or ensure_policy(config)
    tasks = load_domain(config.env).tasks("heldout")
    by_kind: dict[str, list[Task]] = {}
    for task in tasks:
        by_kind.setdefault(task.kind, []).append(task)
    for kind in args.kind or sorted(by_kind):
        trees = asyncio.run(grow(config, policy, by_kind[kind][: args.tasks], args.roots, args.forks))
        print(report(kind, trees, decided_by_depth(trees, width=args.width), args.min_pairs) + "\n", flush=True)


if __name__ == "__main__":
    main()
