"""Prompts are told the market's price, and what they spend comes back to it."""

from dataclasses import replace

from tests.support.fake_parts import FakePrompts
from tests.unit.actors.test_admission import Run
from tests.unit.method.test_market import grown
from trace_async.method.market import MIN_TREES, Offer
from trace_async.run.state import PendingPrompt
from trace_async.trees.tree import RolloutTree
from trace_async.types import Task, VersionSpan


class Spending(FakePrompts):
    """Every prompt has two roots of 20 tokens and a continuation of 30 at the first."""

    def __init__(self) -> None:
        super().__init__()
        self.offers: list[Offer | None] = []

    async def run(self, ticket: int, prompt: PendingPrompt, task: Task) -> RolloutTree:
        self.offers.append(prompt.offer)
        await super().run(ticket, prompt, task)
        spans = (VersionSpan(0, prompt.policy_version),)
        tree = grown([0.4, 0.6], [1.0, 0.0], [1, 0])
        return RolloutTree(
            task=task,
            nodes=tuple(replace(node, version_spans=spans) if node.num_generated else node for node in tree.nodes),
            rollouts=tree.rollouts,
            policy_version_started=prompt.policy_version,
            num_roots_allocated=2,
            num_continuations_allocated=1,
        )


async def test_a_price_is_offered_once_enough_trees_have_ended():
    prompts = Spending()
    run = Run(prompts, "budget.stage1=uniform", "budget.uniform_rollouts=2", "budget.stage2=price")
    await run.updates()
    prices = [offer.price for offer in prompts.offers if offer is not None]
    assert len(prices) == len(prompts.offers) > 2 * MIN_TREES
    assert prices[:MIN_TREES] == [None] * MIN_TREES
    last = prices[-1]
    # An anchor's first continuation is worth .6 or .6, for 30 tokens each.
    assert last is not None
    assert 0 < last <= 0.6 / 30
    assert run.admission.market.metrics()["stage2/share_before/turn_1"] == 10 / 40
    # What goes into a checkpoint knows nothing of offers.
    assert all(prompt.offer is None for prompt in run.admission.rounds.pending.values())
