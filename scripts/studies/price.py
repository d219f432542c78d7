"""How near each rule of Stage 2 comes to the best that its tokens could buy, on prompts whose values are known.

    python -m scripts.studies.price [--prompts 600] [--per-root 2]

Prompts come one after another, as in a run: each has 2 to 4 root rollouts of up to eight turns, with V(H) known at
every turn. A rule buys on each with what it can know then; a price learns from the prompts before. What it bought is
worth Σ V_pref (and, of further roots, the chance that one ends unlike the first ones). The optimum is over all prompts
at once, for the same expected tokens: every unit's worth per token falls, so the best units are it, and the last one
may be bought in part, which makes it an upper bound.
"""

import argparse
from collections.abc import Sequence

import numpy as np

from trace_async.config import BudgetConfig
from trace_async.method.anchors import Anchor, find_anchors, prompt_anchor
from trace_async.method.knapsack import IntArray
from trace_async.method.market import MAX_PER_PREFIX, Market, marginal_contrast
from trace_async.method.registry import stage2_rule
from trace_async.trees.builder import Branch, TreeBuilder
from trace_async.trees.tree import ROOT, RolloutTree
from trace_async.types import Completion, Task, VersionSpan

RULES = ("random", "contrast", "contrast_value_only", "contrast_per_token", "topup", "price")
STRENGTH = 4.0  # pseudo rollouts behind what is believed of a prompt


class Prompt:
    """A prompt of `success` V, whose rollouts take `turns` turns of about `tokens` tokens each."""

    def __init__(self, number: int, rng: np.random.Generator) -> None:
        self.rng = rng
        self.success = float(np.clip(rng.beta(0.6, 0.6), 0.02, 0.98))
        self.turns, self.tokens = int(rng.integers(2, 9)), float(rng.uniform(5, 40))
        self.builder = TreeBuilder(
            Task(id=f"p{number}", domain="known", kind="known", data={}), root_value=self.success
        )
        self.builder.set_prompt((0,))
        for _ in range(int(rng.integers(2, 5))):
            self.play(Branch("root", ROOT), self.success)

    def play(self, branch: Branch, value: float) -> None:
        """From a prefix of this value to the end: V is a martingale, the outcome a draw from its last one."""
        values = []
        for turn in range(self.builder.depths[branch.anchor], self.turns):
            left = self.turns - turn
            value = float(self.rng.beta(value * left + 1e-3, (1 - value) * left + 1e-3))
            count = int(self.rng.integers(1, round(2 * self.tokens)))
            written = Completion(
                token_ids=(1,) * count,
                logprobs=(-1.0,) * count,
                version_spans=(VersionSpan(0, 0),),
                finish_reason="stop",
                prompt_tokens=0,
                cached_tokens=0,
            )
            branch.append(written, ())
            values.append(value)
        reward = float(self.rng.random() < value)
        for node, known in zip(self.builder.add(branch, reward, {}), values, strict=True):
            self.builder.set_value(node, known)

    def anchors(self) -> list[Anchor]:
        """Everything that Stage 2 could buy: the turns, and the prompt while its roots agree."""
        rewards = [rollout.reward for rollout in self.builder.rollouts]
        prompt = prompt_anchor(rewards, value=self.success, strength=STRENGTH, expected_tokens=self.tokens * self.turns)
        return [*([prompt] if prompt else []), *find_anchors(self.builder)]

    def cost(self, anchor: Anchor) -> float:
        """Expected tokens of a rollout from there, as they are."""
        return max(1.0, self.tokens * (self.turns - anchor.depth))

    def buy(self, anchors: Sequence[Anchor], counts: IntArray) -> RolloutTree:
        for anchor, count in zip(anchors, counts, strict=True):
            for _ in range(int(count)):
                branch = Branch("continuation", anchor.node) if anchor.depth else Branch("root", ROOT, 1)
                self.play(branch, anchor.value)
        return self.builder.tree()


def shares(rule_name: str, *, num_prompts: int, per_root: int, seed: int = 0) -> tuple[float, float, float]:
    """Return (worth of what the rule bought ÷ the optimum's at its tokens, the same over turns only, tokens ÷ budget).

    Of the second half of the prompts, when a price has settled.
    """
    settings = BudgetConfig(stage2=rule_name, continuations_per_root=per_root, max_per_prefix=MAX_PER_PREFIX)
    market, rng, choices = Market(settings), np.random.default_rng(seed), np.random.default_rng(seed + 1)
    worth = spent = budget = 0.0
    units: list[tuple[float, float, bool]] = []  # contrast per token, tokens, whether of a turn
    for number in range(num_prompts):
        prompt = Prompt(number, rng)
        rule = stage2_rule(settings, market.offer())
        anchors = prompt.anchors()
        roots = len(prompt.builder.rollouts)
        offered = [a for a in anchors if (rule.forks if a.depth else rule.buys_roots)]
        counts = rule.spend(offered, per_root * roots, choices) if offered else np.zeros(0, dtype=np.int64)
        if 2 * number >= num_prompts:
            budget += per_root / 2 * sum(node.num_generated for node in prompt.builder.nodes)
            for anchor in anchors:
                rates = marginal_contrast(anchor, MAX_PER_PREFIX) / prompt.cost(anchor)
                units += [(float(rate), prompt.cost(anchor), anchor.depth > 0) for rate in rates]
            for anchor, count in zip(offered, counts, strict=True):
                worth += float(marginal_contrast(anchor, int(count)).sum())
                spent += prompt.cost(anchor) * int(count)
        market.observe(prompt.buy(offered, counts), root_strength=STRENGTH)
    turns = [unit for unit in units if unit[2]]
    return worth / best(units, spent), worth / best(turns, spent), spent / budget


def best(units: Sequence[tuple[float, float, bool]], tokens: float) -> float:
    """Return the most that so many tokens can buy."""
    rates, costs = np.array([unit[:2] for unit in sorted(units, reverse=True)]).T
    bought = np.clip((tokens - (np.cumsum(costs) - costs)) / costs, 0, 1)
    return float((bought * costs * rates).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=600)
    parser.add_argument("--per-root", type=int, default=2, help="N, continuations for every root rollout")
    parser.add_argument("--seeds", type=int, default=4)
    args = parser.parse_args()
    print("| rule | share of the optimum | of the optimum over turns only | tokens ÷ budget |\n|---|---|---|---|")
    for rule in RULES:
        found = [shares(rule, num_prompts=args.prompts, per_root=args.per_root, seed=s) for s in range(args.seeds)]
        mean, error = np.mean(found, axis=0), np.std(found, axis=0, ddof=1) / len(found) ** 0.5
        print(f"| {rule} | " + " | ".join(f"{m:.3f} ± {e:.3f}" for m, e in zip(mean, error, strict=True)) + " |")


if __name__ == "__main__":
    main()
