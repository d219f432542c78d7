"""What Stage 2 has cost and brought so far: the price of contrast, and at which depths continuations pay (METHOD 8).

    finished trees ─► Market.observe          Market.offer ─► Stage2Rule of the next prompt

One worked example: prompts have one anchor each, of V = .5, whose continuations write 10 tokens. A first continuation
is worth .5, so .05 a token, the second .25, so .025. If the budget is 15 tokens a prompt, the price comes to rest
at .025, and a prompt whose anchor has V = .97 buys nothing for a success (.03 / 10).

Everything here is measured on the last `window` trees. It is not kept in checkpoints: after a resume the first prompts
spend as published, and an update later the window is full again.
"""

import logging
import math
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trace_async.method.anchors import Anchor, find_anchors, prompt_anchor
from trace_async.method.knapsack import FloatArray
from trace_async.method.registry import stage2_class
from trace_async.method.settings import BudgetSettings
from trace_async.trees.tree import ROOT, RolloutTree

log = logging.getLogger(__name__)

MAX_PER_PREFIX = 8
"""Continuations of one prefix that a price may buy at most, where budget.max_per_prefix says nothing."""
MIN_TREES = 8
"""Trees before there is a price."""
MIN_ANCHORS = 16
"""Anchors with at least two continuations before a depth may be closed."""
PROBE_EVERY = 8
"""Every so many prompts look at closed depths, too: else nobody would see that they pay again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """What Stage 2 of one prompt may know of all the others. The default: nothing is known yet."""

    price: float | None = None
    """λ: a continuation is bought while its expected contrast per expected token is above it."""
    tokens_after: tuple[float, ...] = ()
    """By depth, tokens that a continuation there was seen to write; 0: never seen."""
    closed_depths: frozenset[int] = frozenset()
    """Depths at which continuations do not pay."""


@dataclass(frozen=True, slots=True)
class DepthFigures:
    """What was measured at one depth; nan where nothing was."""

    num_anchors: int
    """Anchors with at least two continuations."""
    rho: float
    """Share of the outcome's variance that the prefix has decided."""
    share_before: float
    """s, share of a rollout's tokens that lie before the fork."""

    @property
    def break_even(self) -> float:
        """2ρ/(1+ρ): a second leaf beats a new root rollout only if s is above it."""
        return 2 * self.rho / (1 + self.rho)

    @property
    def pays(self) -> bool:
        """True as long as too little was measured to say no."""
        return self.num_anchors < MIN_ANCHORS or not self.share_before <= self.break_even


@dataclass(frozen=True, slots=True)
class _Fork:
    """The continuations of one anchor. `within`, `between`: variance of their rewards, and of the prompt's roots'."""

    depth: int
    tokens_before: int
    tokens: tuple[int, ...]
    within: float | None
    between: float | None


@dataclass(frozen=True, slots=True)
class _Seen:
    """What the market keeps of a finished tree. `budget`, `spent`: tokens that Stage 2 might and did write there."""

    budget: float
    spent: int
    anchors: tuple[Anchor, ...]
    forks: tuple[_Fork, ...]


class Market:
    """Watches finished trees; offers the next prompt a price and the depths that pay."""

    def __init__(self, settings: BudgetSettings, *, window: int = 256) -> None:
        self.settings = settings
        self._rule = stage2_class(settings.stage2)
        self.seen: deque[_Seen] = deque(maxlen=window)
        self.closed: frozenset[int] = frozenset()
        self.num_offers = 0
        self._root_tokens: dict[str, float] = {}
        self._owed = 0.0  # tokens of budget not spent yet (negative: overspent)

    def observe(self, tree: RolloutTree, *, root_strength: float | None = None) -> None:
        """Take in a finished tree. `root_strength`: pseudo rollouts behind the V of its prompt."""
        if not tree.rollouts:
            return
        self._root_tokens[tree.task.id] = max(1.0, _mean_root_tokens(tree))
        if not self.settings.continuations_per_root:
            return
        anchors = [*_turns(tree)] if self._rule.forks else []
        if self._rule.buys_roots and (prompt := _prompt(tree, root_strength)) is not None:
            anchors.append(prompt)
        seen = _look_at(tree, self.settings.continuations_per_root, tuple(anchors))
        self.seen.append(seen)
        self._owed += seen.budget - seen.spent
        if self.settings.continuations == "auto":
            self._close_depths()

    def offer(self) -> Offer:
        """For the next prompt."""
        self.num_offers += 1
        probes = self.num_offers % PROBE_EVERY == 0
        return Offer(
            price=self.price() if len(self.seen) >= MIN_TREES else None,
            tokens_after=self.tokens_after(),
            closed_depths=frozenset() if probes else self.closed,
        )

    def root_tokens(self, task_ids: Sequence[str]) -> FloatArray | None:
        """Expected tokens of a root rollout of each task: as it was seen last, else the mean of all tasks seen."""
        if len(self._root_tokens) < MIN_TREES:
            return None
        mean = sum(self._root_tokens.values()) / len(self._root_tokens)
        return np.array([self._root_tokens.get(task_id, mean) for task_id in task_ids])

    def tokens_after(self) -> tuple[float, ...]:
        """By depth, mean tokens of the continuations that started there; 0 where there was none."""
        tokens: dict[int, list[int]] = defaultdict(list)
        for seen in self.seen:
            for fork in seen.forks:
                tokens[fork.depth].extend(fork.tokens)
        depths = range(max(tokens, default=-1) + 1)
        return tuple(sum(tokens[depth]) / len(tokens[depth]) if tokens[depth] else 0.0 for depth in depths)

    def price(self) -> float:
        """The price at which the window's prompts would have spent their budget, and what is still owed, in tokens.

        What is owed is settled within a window, as far as between a tenth and three times the budget does it.
        """
        anchors = [anchor for seen in self.seen for anchor in seen.anchors]
        budget = sum(seen.budget for seen in self.seen)
        if not anchors or not budget:
            return 0.0
        tokens_after, most = self.tokens_after(), self.settings.max_per_prefix or MAX_PER_PREFIX
        tokens = np.array([expected_tokens(anchor, tokens_after) for anchor in anchors])
        rates = np.array([marginal_contrast(anchor, most) for anchor in anchors]) / tokens[:, None]
        order = np.argsort(-rates.ravel(), kind="stable")
        spent = np.cumsum(np.repeat(tokens, most)[order])
        aim = budget + float(np.clip(self._owed, -0.9 * budget, 2 * budget))
        bought = int(np.searchsorted(spent, aim, side="right"))
        return float(rates.ravel()[order[min(bought, len(order) - 1)]])

    def figures(self) -> dict[int, DepthFigures]:
        """ρ and s by depth, over the window."""
        forks: dict[int, list[_Fork]] = defaultdict(list)
        for seen in self.seen:
            for fork in seen.forks:
                forks[fork.depth].append(fork)
        found = {}
        for depth, some in sorted(forks.items()):
            before = sum(fork.tokens_before * len(fork.tokens) for fork in some)
            total = before + sum(sum(fork.tokens) for fork in some)
            pairs = [(f.within, f.between) for f in some if f.within is not None and f.between is not None]
            found[depth] = DepthFigures(len(pairs), _decided(pairs), before / total if total else math.nan)
        return found

    def _close_depths(self) -> None:
        figures = self.figures()
        closed = frozenset(depth for depth, found in figures.items() if not found.pays)
        for depth in sorted(closed ^ self.closed):
            log.info("continuations after turn %d %s", depth, _verdict(depth in closed, figures.get(depth)))
        self.closed = closed

    def metrics(self) -> dict[str, float]:
        """For the log: `stage2/price`, and by depth `share_before` (s), `rho`, `break_even` and `pays`."""
        if not self.seen:
            return {}
        found = {"stage2/price": self.price()}
        for depth, figures in self.figures().items():
            found[f"stage2/share_before/turn_{depth}"] = figures.share_before
            if figures.num_anchors >= MIN_ANCHORS and not math.isnan(figures.rho):
                found[f"stage2/rho/turn_{depth}"] = figures.rho
                found[f"stage2/break_even/turn_{depth}"] = figures.break_even
                found[f"stage2/pays/turn_{depth}"] = float(figures.pays)
        return found


def _verdict(is_closed: bool, figures: DepthFigures | None) -> str:
    if figures is None:  # nothing of it is left in the window
        return "are tried again"
    return (
        f"{'do not pay' if is_closed else 'are bought again'}: s = {figures.share_before:.2f} of a rollout's tokens "
        f"lie before the fork, 2ρ/(1+ρ) = {figures.break_even:.2f} (ρ = {figures.rho:.2f}, "
        f"{figures.num_anchors} anchors)"
    )


def _look_at(tree: RolloutTree, per_root: int, anchors: tuple[Anchor, ...]) -> _Seen:
    generated = [node.num_generated for node in tree.nodes]
    tokens = [sum(generated[node] for node in tree.fresh_nodes(index)) for index in range(len(tree.rollouts))]
    roots = [index for index, rollout in enumerate(tree.rollouts) if rollout.from_stage1]
    bought: dict[int, list[int]] = defaultdict(list)
    for index, rollout in enumerate(tree.rollouts):
        if rollout.kind == "continuation":
            bought[rollout.anchor].append(index)
    between = _variance([tree.rollouts[index].reward for index in roots])
    forks = [
        _Fork(
            depth=tree.depths[anchor],
            tokens_before=sum(generated[node] for node in tree.path(anchor)),
            tokens=tuple(tokens[index] for index in continuations),
            within=_variance([tree.rollouts[index].reward for index in continuations]),
            between=between,
        )
        for anchor, continuations in bought.items()
    ]
    root_tokens = sum(tokens[index] for index in roots)
    return _Seen(
        # N continuations for every root rollout, and each counts as half a trajectory.
        budget=root_tokens * per_root / 2,
        spent=sum(tokens) - root_tokens,
        anchors=anchors,
        forks=tuple(forks),
    )


# What was there when Stage 2 began.


def _turns(tree: RolloutTree) -> list[Anchor]:
    """Turns of Stage 1's rollouts after which those themselves went on."""
    found = [(anchor, tree.rollouts[tree.nodes[anchor.node].rollout]) for anchor in find_anchors(tree)]
    return [anchor for anchor, passed in found if passed.from_stage1 and passed.leaf != anchor.node]


def _prompt(tree: RolloutTree, strength: float | None) -> Anchor | None:
    return prompt_anchor(
        [rollout.reward for rollout in tree.rollouts if rollout.from_stage1],
        value=tree.nodes[ROOT].value,
        strength=strength,
        expected_tokens=_mean_root_tokens(tree),
    )


def _mean_root_tokens(tree: RolloutTree) -> float:
    roots = [index for index, rollout in enumerate(tree.rollouts) if rollout.from_stage1]
    return sum(tree.nodes[node].num_generated for index in roots for node in tree.fresh_nodes(index)) / max(
        1, len(roots)
    )


def _variance(rewards: list[float]) -> float | None:
    """Unbiased, with n − 1; None: of fewer than two."""
    return float(np.var(rewards, ddof=1)) if len(rewards) > 1 else None


def _decided(pairs: list[tuple[float, float]]) -> float:
    """ρ = 1 − E[Var(r | prefix)] / E[Var(r | prompt)], over the same prompts; in [0, 1]."""
    within, between = (sum(part) for part in zip(*pairs, strict=True)) if pairs else (0.0, 0.0)
    return float(np.clip(1 - within / between, 0, 1)) if between else math.nan


def marginal_contrast(anchor: Anchor, count: int) -> np.ndarray:
    """What the 1st, 2nd … `count`-th rollout from here adds to the chance that one ends unlike what is known; falling.

    V_pref's marginals, (1 − x)·x^(k−1) with x the chance that one ends alike (METHOD 2). Where V has a posterior of
    `strength` s, E[x^k] = Π_{j<k} (x·s + j)/(s + j).
    """
    alike = anchor.reward * anchor.value + (1 - anchor.reward) * (1 - anchor.value)
    known = np.arange(count)
    # The chance that rollout k + 1 ends alike, once k did.
    chances = (
        np.full(count, alike)
        if anchor.strength is None
        else ((alike * anchor.strength + known) / (anchor.strength + known))
    )
    all_alike = np.concatenate([[1.0], np.cumprod(chances)])
    return np.asarray(all_alike[:-1] - all_alike[1:])


def expected_tokens(anchor: Anchor, tokens_after: tuple[float, ...]) -> float:
    """As was seen at this depth; where nothing was, as the prompt's own rollouts went on. At least 1."""
    seen = tokens_after[anchor.depth] if anchor.depth < len(tokens_after) else 0.0
    return max(1.0, seen or anchor.expected_tokens)
