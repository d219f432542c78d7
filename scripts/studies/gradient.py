"""How well one update points uphill, per method of a comparison, with values known by rollouts instead of a predictor.

    python -m scripts.studies.gradient configs/compare/gradient.yaml [--policy runs/NAME/policy]

The policy stands still. The reference is the gradient of mean success over the questions that can be learnt (`--kind`),
from many rollouts. Each method then plays updates as in training, but Stages 1 and 2 see V measured by
`--oracle` rollouts a prompt or prefix: what is left is the principle, without the predictor's error. Reported: the
cosine between an update's gradient and the reference, generated tokens, E‖ĝ‖² (proposition 3).
"""

import argparse
import asyncio
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from envs import load_domain
from scripts.comparison.plan import load_comparison
from scripts.start_policy import ensure_policy
from trace_async.config import Config, LossConfig
from trace_async.engine import Engine
from trace_async.engines import make_engine
from trace_async.learner.learner import TokenLogprobs
from trace_async.learner.loss import LossTerms, policy_loss
from trace_async.method.aggregation import normalize_credits
from trace_async.method.anchors import Anchor
from trace_async.method.credit import NodeCredit, compute_credits
from trace_async.method.posterior import Estimates
from trace_async.method.registry import stage1_rule, stage2_rule
from trace_async.packing.attention import attention_for, prepare_model
from trace_async.packing.layout import pack_all
from trace_async.policy.load import load_model, load_tokenizer
from trace_async.rollout.expansion import Expansion
from trace_async.rollout.grower import make_grower
from trace_async.rollout.renderer import Renderer
from trace_async.run.dataset import TaskIterator
from trace_async.trees.tree import RolloutTree
from trace_async.types import Completion, SamplingParams, Task

AT_ONCE = 192  # prompts under way


class Gradient:
    """The gradient of a batch of trees at the standing policy, as one flat vector."""

    def __init__(self, policy: Path, temperature: float) -> None:
        self.model = load_model(policy)
        kind = attention_for(torch.device("cpu"), flat=False)
        prepare_model(self.model, kind)
        self.module = TokenLogprobs(self.model, kind, temperature=temperature, chunk_tokens=4096, entropy=False)

    def __call__(self, trees: Sequence[RolloutTree], credits: Sequence[NodeCredit], max_tokens: int) -> np.ndarray:
        self.model.zero_grad()
        for batch in pack_all(trees, credits, packing="tree", max_tokens=max_tokens):
            logprobs, _ = self.module(batch)
            terms = LossTerms(learner_logprobs=logprobs, proximal_logprobs=logprobs.detach())
            loss, _ = policy_loss(batch.entries, terms, LossConfig())
            loss.backward()
        parts = [p.grad.flatten() if p.grad is not None else torch.zeros(p.numel()) for p in self.model.parameters()]
        return -torch.cat(parts).double().numpy()


@dataclass
class Player:
    """Plays trees with the standing policy. `outcomes`: of the oracle's rollouts so far, by task."""

    config: Config
    engine: Engine
    renderer: Renderer
    oracle_rollouts: int
    outcomes: dict[str, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.domain = load_domain(self.config.env)
        self.slots = asyncio.Semaphore(AT_ONCE)
        self.grower = make_grower(self.config, self.domain, self.renderer, self.generate, max_retries=0)

    async def generate(self, task: Task, prompt_ids: tuple[int, ...], params: SamplingParams) -> Completion:
        return await self.engine.generate(prompt_ids, params)

    async def tree(self, task: Task, num_roots: int, expansion: Expansion | None = None) -> RolloutTree:
        async with self.slots:
            return await self.grower.grow(task, num_roots, expansion)

    async def measure(self, tasks: Sequence[Task]) -> Estimates:
        """Beta posteriors from the oracle's rollouts, each task's only once."""
        missing = [task for task in tasks if task.id not in self.outcomes]
        for tree in await asyncio.gather(*(self.tree(task, self.oracle_rollouts) for task in missing)):
            self.outcomes[tree.task.id] = [rollout.reward for rollout in tree.rollouts]
        return Estimates.of_outcomes([self.outcomes[task.id] for task in tasks])

    async def update(self, config: Config, tasks: Sequence[Task], seed: int) -> list[RolloutTree]:
        """Return the trees of one update of a method, over the candidates `tasks`."""
        budget, rng = config.budget, np.random.default_rng(seed)
        roots, continuations = stage1_rule(budget), stage2_rule(budget)
        estimates = await self.measure(tasks) if roots.needs_estimates else Estimates.unknown(len(tasks))
        counts = roots.plan(estimates, budget.root_rollouts, rng)

        def plan(anchors: Sequence[Anchor], budget: int) -> np.ndarray:
            return continuations.spend(anchors, budget, rng)

        expansion = None
        if (continuations.forks or continuations.buys_roots) and budget.continuations_per_root:
            rollouts = self.oracle_rollouts if continuations.needs_values else 0
            expansion = Expansion(
                plan=plan,
                per_root=budget.continuations_per_root,
                rounds=budget.stage2_rounds,
                oracle_rollouts=rollouts,
                forks=continuations.forks,
                buys_roots=continuations.buys_roots,
            )
        chosen = [(task, int(count)) for task, count in zip(tasks, counts, strict=True) if count]
        return list(await asyncio.gather(*(self.tree(task, count, expansion) for task, count in chosen)))


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b) + 1e-30))


async def reference(player: Player, gradient: Gradient, tasks: Sequence[Task], rollouts: int) -> np.ndarray:
    """∇ of mean success over `tasks`, exact but for sampling: leave-one-out, every prompt 1/n, no token divisor."""
    total = np.zeros(sum(p.numel() for p in gradient.model.parameters()))
    for start in range(0, len(tasks), 50):
        trees = await asyncio.gather(*(player.tree(task, rollouts) for task in tasks[start : start + 50]))
        total += gradient(trees, compute_credits("trace", trees), player.config.learner.max_tokens_per_micro_batch)
    return total / len(tasks)


async def study(args: argparse.Namespace, base: Config, policy: Path) -> None:
    with tempfile.TemporaryDirectory() as logs:
        engine = make_engine(
            base.engine,
            policy_path=policy,
            max_context_tokens=base.sampling.max_context_tokens,
            seed=args.seed,
            log_dir=Path(logs),
        )
        await engine.start()
        try:
            renderer = Renderer(load_tokenizer(policy), max_observation_tokens=base.sampling.max_observation_tokens)
            player = Player(base, engine, renderer, args.oracle)
            await compare(args, player, Gradient(policy, base.sampling.temperature))
        finally:
            await engine.close()


async def compare(args: argparse.Namespace, player: Player, gradient: Gradient) -> None:
    comparison = load_comparison(args.comparison)
    learnable = [task for task in player.domain.tasks("heldout") if task.kind.startswith(args.kind)][
        : args.reference_tasks
    ]
    started = time.monotonic()
    halves = [await reference(player, gradient, learnable[part::2], args.reference_rollouts) for part in (0, 1)]
    truth, agreement = halves[0] + halves[1], cosine(*halves)
    # The cosine of the whole with the truth, were the halves' noise alike (Spearman-Brown).
    reliability = (2 * agreement / (1 + agreement)) ** 0.5
    print(
        f"reference: {len(learnable)} questions × {args.reference_rollouts} rollouts, its halves agree by cosine "
        f"{agreement:.3f}, so it should meet the truth by {reliability:.3f}; {time.monotonic() - started:.0f} s\n"
    )
    print("| method | cosine with the reference | generated tokens | prompts | both outcomes | E‖ĝ‖² |")
    print("|---|---|---|---|---|---|", flush=True)
    for name in args.methods or comparison.methods:
        config = comparison.run_config(name, args.seed)
        # The same candidates for every method, as far as their pools go.
        iterator = TaskIterator(player.domain.tasks("train"), seed=args.seed)
        rows = []
        for number in range(args.updates):
            candidates = iterator.take(args.candidates)[: config.budget.pool_size]
            trees = await player.update(config, candidates, seed=number)
            credits = compute_credits(config.loss.advantage, trees, normalize_std=config.loss.normalize_std)
            credits = normalize_credits(
                trees, credits, config.loss.aggregation, divisor_tokens=config.loss.divisor_tokens
            )
            found = gradient(trees, credits, config.learner.max_tokens_per_micro_batch)
            both = sum(tree.has_both_outcomes for tree in trees)
            tokens = sum(tree.num_generated_tokens for tree in trees)
            rows.append([cosine(found, truth), tokens, len(trees), both, float(found @ found)])
        mean, error = np.mean(rows, axis=0), np.std(rows, axis=0, ddof=1) / len(rows) ** 0.5
        print(
            f"| {comparison.label(name)} | {mean[0]:.3f} ± {error[0]:.3f} | {mean[1]:.0f} | {mean[2]:.1f} "
            f"| {mean[3]:.1f} | {mean[4]:.3g} ± {error[4]:.2g} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", type=Path, help="YAML file whose methods are studied")
    parser.add_argument("--policy", type=Path, help="Hugging Face directory; by default the start policy")
    parser.add_argument("--methods", nargs="*", help="only these")
    parser.add_argument("--kind", default="middle", help="how the kinds of the reference's questions begin")
    parser.add_argument("--oracle", type=int, default=8, help="rollouts that measure V of a prompt or prefix")
    parser.add_argument("--updates", type=int, default=12, help="updates per method")
    parser.add_argument("--candidates", type=int, default=192, help="candidates drawn per update, at least the pools")
    parser.add_argument("--reference-tasks", type=int, default=400)
    parser.add_argument("--reference-rollouts", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    base = replace(load_comparison(args.comparison).base_config(), seed=args.seed)
    asyncio.run(study(args, base, args.policy or ensure_policy(base)))


if __name__ == "__main__":
    main()
