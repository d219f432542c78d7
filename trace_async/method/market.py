"""What Stage 2 has cost and brought so far: the price of contrast, and at which depths continuations pay (METHOD 8).

    finished trees ─► Market.observe          Market.price ─► Stage1Rule of the next round
    rounds         ─► Market.observe_round    Market.offer ─► Stage2Rule of the next prompt

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

from trace_async.method.allocation import root_rates
from trace_async.method.anchors import Anchor, find_anchors, prompt_anchor
from trace_async.method.knapsack import FloatArray, IntArray
from trace_async.method.posterior import Estimates
from trace_async.method.registry import stage1_class, stage2_class
from trace_async.method.settings import BudgetSettings
from trace_async.method.stage2.payoff import DepthFigures, verdict
from trace_async.trees.tree import ROOT, RolloutTree

DECISIONS_LOG = "trace_async.decisions"
"""The logger of decisions about the rest of a run, in words that its user should see."""
log = logging.getLogger(DECISIONS_LOG)

MAX_PER_PREFIX = 8
"""Continuations of one prefix that a price may buy at most, where budget.max_per_prefix says nothing."""
MIN_TREES = 8
"""Trees before there is a price."""
ROUNDS = 8
"""Rounds of Stage 1 whose candidates make the price."""
PROBE_EVERY = 8
"""Every so many prompts look at closed depths, too: else nobody would see that they pay again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """What Stage 2 of one prompt may know of all the others. The default: nothing is known yet."""

    price: float | None = None
    """λ: a continuation is bought while its expected contrast per expected token is above it."""
    dearer: tuple[float, ...] = ()
    """By depth, tokens that continuations there wrote, over what was expected of them; 0: never seen."""
    closed_depths: frozenset[int] = frozenset()
    """Depths at which continuations do not pay."""


@dataclass(frozen=True, slots=True)
class _Fork:
    """The continuations of one anchor. `within`, `between`: variance of their rewards, and of the prompt's roots'."""

    depth: int
    num_roots: int
    tokens_before: int
    tokens: tuple[int, ...]
    expected_tokens: float
    seconds_before: float
    seconds: float
    within: float | None
    between: float | None


@dataclass(frozen=True, slots=True)
class _Seen:
    """What the market keeps of a finished tree. `budget`, `spent`: tokens that might be and were bought at a price.

    Of its anchors: `contrast` [anchors, rollouts], what each further rollout was worth; `tokens`, `depths` [anchors].
    """

    budget: float
    spent: int
    contrast: FloatArray
    tokens: FloatArray
    depths: IntArray
    forks: tuple[_Fork, ...]


@dataclass(frozen=True, slots=True)
class _Round:
    """A round of Stage 1: `rates` [candidates, rollouts] and `tokens` [candidates] of its candidates, the `budget` in
    tokens of all that comes of it, and how many prompts were bought."""

    rates: FloatArray
    tokens: FloatArray
    budget: float
    num_prompts: int


class Market:
    """Watches finished trees; offers the next prompt a price and the depths that pay."""

    def __init__(self, settings: BudgetSettings, *, window: int = 256) -> None:
        self.settings = settings
        self._stage1, self._stage2 = stage1_class(settings.stage1), stage2_class(settings.stage2)
        self._rounds: deque[_Round] = deque(maxlen=ROUNDS)
        self.seen: deque[_Seen] = deque(maxlen=window)
        self.closed: frozenset[int] = frozenset()
        self.decisions: dict[int, str] = {}
        """By depth, what budget.continuations=auto decided last and why, in words."""
        self.num_offers = 0
        self._root_tokens: dict[str, float] = {}
        self._owed = 0.0  # tokens of budget not spent yet (negative: overspent)
        # With Stage 1 at a price, what Stage 2 of each prompt under way may cost; None: it was planned without a price.
        self._credits: deque[float | None] = deque()

    def observe(self, tree: RolloutTree, *, root_strength: float | None = None) -> None:
        """Take in a finished tree. `root_strength`: pseudo rollouts behind the V of its prompt."""
        credit = self._take_credit()
        if not tree.rollouts:
            return
        expected, mean = self.root_tokens([tree.task.id]), _mean_root_tokens(tree)
        if self._stage1.at_price and expected is not None:  # what was owed when the round was planned
            self._owed += (float(expected[0]) - mean) * sum(rollout.from_stage1 for rollout in tree.rollouts)
        self._root_tokens[tree.task.id] = max(1.0, mean)
        anchors = [*_turns(tree)] if self._stage2.forks and self.settings.continuations_per_root else []
        if self._stage2.buys_roots and (prompt := _prompt(tree, root_strength)) is not None:
            anchors.append(prompt)
        seen = self._look_at(tree, tuple(anchors))
        self.seen.append(seen)
        # What Stage 2 may cost is owed only now that it is spent: what is under way would make the price fall.
        if not self._stage1.at_price:
            self._owed += seen.budget - (seen.spent if self._stage2.at_price else 0.0)
        elif self._stage2.at_price and credit is not None:
            self._owed += credit - seen.spent
        if self.settings.continuations != "always":
            self._decide()

    def lose(self) -> None:
        """A prompt under way ended without a tree."""
        self._take_credit()

    def _take_credit(self) -> float | None:
        """That of the prompt planned first; which of those under way it was does not matter for the sum."""
        return self._credits.popleft() if self._credits else None

    def observe_round(self, estimates: Estimates, counts: IntArray) -> None:
        """Take in a round of Stage 1: what its candidates had to offer, and the roots that each of them got."""
        if not self._stage1.at_price:
            return
        num_prompts = int((counts > 0).sum())
        if estimates.tokens is None:
            self._credits.extend([None] * num_prompts)
        else:
            rates = root_rates(
                estimates.mean,
                estimates.tokens,
                max_rollouts=self.settings.max_rollouts,
                strength=estimates.strength,
            )
            own = self.settings.continuations_per_root / 2 if self._stage2.at_price else 0.0
            of_roots = self.settings.root_rollouts * float(estimates.tokens.mean())
            self._rounds.append(_Round(rates, estimates.tokens, (1 + own) * of_roots, num_prompts))
            self._owed += of_roots - float(counts @ estimates.tokens)
            if num_prompts:
                self._credits.extend([own * of_roots / num_prompts] * num_prompts)
            else:
                self._owed += own * of_roots

    def offer(self) -> Offer:
        """For the next prompt."""
        self.num_offers += 1
        probes = self.num_offers % PROBE_EVERY == 0
        return Offer(
            price=self.price(),
            dearer=self.dearer(),
            closed_depths=frozenset() if probes else self.closed,
        )

    def root_tokens(self, task_ids: Sequence[str]) -> FloatArray | None:
        """Expected tokens of a root rollout of each task: as it was seen last, else the mean of all tasks seen."""
        if len(self._root_tokens) < MIN_TREES:
            return None
        mean = sum(self._root_tokens.values()) / len(self._root_tokens)
        return np.array([self._root_tokens.get(task_id, mean) for task_id in task_ids])

    def dearer(self) -> tuple[float, ...]:
        """By depth, Σ tokens of the continuations that started there ÷ Σ of what was expected; 0: there was none."""
        written: dict[int, float] = defaultdict(float)
        expected: dict[int, float] = defaultdict(float)
        for fork in (fork for seen in self.seen for fork in seen.forks):
            written[fork.depth] += sum(fork.tokens)
            expected[fork.depth] += fork.expected_tokens * len(fork.tokens)
        return tuple(
            written[depth] / expected[depth] if depth in expected else 0.0
            for depth in range(max(expected, default=-1) + 1)
        )

    def price(self) -> float | None:
        """λ at which the window's prompts would have spent their budget, and what is still owed, in tokens.

        What is owed is settled within a full window, as far as between a tenth and three times the budget does it.
        None: too little was seen, or nothing is bought at a price.
        """
        window: deque[_Round] | deque[_Seen] = self._rounds if self._stage1.at_price else self.seen
        if len(self.seen) < MIN_TREES or not window:
            return None
        rates, tokens = self._supply()
        if not rates.size:
            return None
        order = np.argsort(-rates, kind="stable")
        spent = np.cumsum(tokens[order])
        budget = sum(one.budget for one in window)
        owed = self._owed * len(window) / (window.maxlen or 1)
        aim = budget + float(np.clip(owed, -0.9 * budget, 2 * budget))
        bought = int(np.searchsorted(spent, aim, side="right"))
        return float(rates[order[min(bought, len(order) - 1)]])

    def _supply(self) -> tuple[FloatArray, FloatArray]:
        """All that the window had to offer: contrast per token of each rollout, and its tokens."""
        rates, tokens = [np.zeros(0)], [np.zeros(0)]
        share = 1.0  # of the window's trees, as many as the rounds bought
        if self._stage1.at_price:
            share = sum(one.num_prompts for one in self._rounds) / len(self.seen)
            rates += [one.rates.ravel() for one in self._rounds]
            tokens += [np.repeat(one.tokens, one.rates.shape[1]) for one in self._rounds]
        if self._stage2.at_price:
            contrast = np.concatenate([seen.contrast for seen in self.seen])
            expected = np.concatenate([seen.tokens for seen in self.seen])
            depths = np.concatenate([seen.depths for seen in self.seen])
            cost = expected_tokens(expected, depths, self.dearer())
            rates.append((contrast / cost[:, None]).ravel())
            tokens.append(np.repeat(share * cost, contrast.shape[1]))
        return np.concatenate(rates), np.concatenate(tokens)

    def figures(self) -> dict[int, DepthFigures]:
        """ρ and s by depth, over the window."""
        forks: dict[int, list[_Fork]] = defaultdict(list)
        for seen in self.seen:
            for fork in seen.forks:
                forks[fork.depth].append(fork)
        found = {}
        for depth, some in sorted(forks.items()):
            before = sum(fork.tokens_before * len(fork.tokens) for fork in some)
            before_s = sum(fork.seconds_before * len(fork.tokens) for fork in some)
            pairs = [(f.within, f.between) for f in some if f.within is not None and f.between is not None]
            found[depth] = DepthFigures(
                len(pairs),
                _decided(pairs),
                _share(before, sum(sum(fork.tokens) for fork in some)),
                _share(before_s, sum(fork.seconds for fork in some)),
                sum(fork.num_roots for fork in some) / len(some),
                sum(len(fork.tokens) for fork in some) / len(some),
            )
        return found

    def _look_at(self, tree: RolloutTree, anchors: tuple[Anchor, ...]) -> _Seen:
        forks = _forks(tree)
        root_tokens = sum(sum(_tokens(tree, index)) for index, r in enumerate(tree.rollouts) if r.from_stage1)
        spent = tree.num_generated_tokens - root_tokens
        # N continuations for every root rollout, and each counts as half a trajectory.
        budget = root_tokens * self.settings.continuations_per_root / 2
        most = self.settings.max_per_prefix or MAX_PER_PREFIX
        return _Seen(
            budget=budget,
            spent=spent,
            contrast=np.array([marginal_contrast(anchor, most) for anchor in anchors]).reshape(-1, most),
            tokens=np.array([anchor.expected_tokens for anchor in anchors], dtype=float),
            depths=np.array([anchor.depth for anchor in anchors], dtype=np.int64),
            forks=forks,
        )

    def _decide(self) -> None:
        """Close the depths at which continuations do not pay; say so in words, and the first time also that they do."""
        in_seconds = self.settings.continuations == "auto_seconds"
        figures = self.figures()
        measured = {depth for depth, found in figures.items() if found.measured}
        closed = frozenset(depth for depth, found in figures.items() if not found.pays(in_seconds=in_seconds))
        for depth in sorted((closed ^ self.closed) | (measured - self.decisions.keys())):
            again = depth in self.decisions
            words = verdict(depth in closed, figures.get(depth), again=again, in_seconds=in_seconds)
            self.decisions[depth] = f"continuations after turn {depth} {words}"
            log.info("%s", self.decisions[depth])
        self.closed = closed

    def metrics(self) -> dict[str, float]:
        """For the log: `stage2/price`, and by depth `share_before` (s), `rho`, `break_even` and `pays`."""
        price = self.price()
        found = {} if price is None else {"budget/price": price}
        for depth, figures in self.figures().items():
            found[f"stage2/share_before/turn_{depth}"] = figures.share_before
            if not math.isnan(figures.share_before_s):
                found[f"stage2/share_before_s/turn_{depth}"] = figures.share_before_s
            if figures.measured:
                found[f"stage2/rho/turn_{depth}"] = figures.rho
                found[f"stage2/break_even/turn_{depth}"] = figures.break_even
                found[f"stage2/pays/turn_{depth}"] = float(figures.pays())
                found[f"stage2/pays_s/turn_{depth}"] = float(figures.pays(in_seconds=True))
        return found


def _tokens(tree: RolloutTree, rollout: int) -> list[int]:
    """Generated tokens of each turn that the rollout itself wrote."""
    return [tree.nodes[node].num_generated for node in tree.fresh_nodes(rollout)]


def _forks(tree: RolloutTree) -> tuple[_Fork, ...]:
    bought: dict[int, list[int]] = defaultdict(list)
    for index, rollout in enumerate(tree.rollouts):
        if rollout.kind == "continuation":
            bought[rollout.anchor].append(index)
    roots = [rollout.reward for rollout in tree.rollouts if rollout.from_stage1]
    between = _variance(roots)
    expected = {anchor.node: anchor.expected_tokens for anchor in find_anchors(tree)}
    return tuple(
        _Fork(
            depth=tree.depths[anchor],
            num_roots=len(roots),
            tokens_before=sum(tree.nodes[node].num_generated for node in tree.path(anchor)),
            tokens=tuple(sum(_tokens(tree, index)) for index in continuations),
            expected_tokens=expected[anchor],
            seconds_before=sum(tree.nodes[node].seconds for node in tree.path(anchor)),
            seconds=sum(tree.nodes[node].seconds for index in continuations for node in tree.fresh_nodes(index)),
            within=_variance([tree.rollouts[index].reward for index in continuations]),
            between=between,
        )
        for anchor, continuations in bought.items()
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
    roots = [sum(_tokens(tree, index)) for index, rollout in enumerate(tree.rollouts) if rollout.from_stage1]
    return sum(roots) / max(1, len(roots))


def _share(before: float, after: float) -> float:
    return before / (before + after) if before + after else math.nan


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


def expected_tokens(own: FloatArray, depths: IntArray, dearer: tuple[float, ...]) -> FloatArray:
    """As the prompt's own rollouts went on, times how much dearer continuations of this depth were than that.

    `own` and `depths` [anchors].
    """
    factors = np.ones(max(len(dearer), int(depths.max(initial=0)) + 1))
    factors[: len(dearer)] = [factor or 1.0 for factor in dearer]
    return np.maximum(1.0, own * factors[depths])
