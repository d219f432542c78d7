"""A PromptActor goes on while its environment does everything wrong at once: training, evaluation and Stage 1."""

from pathlib import Path

from actors.generators.router import Generators
from actors.prompts.prompt import HeldOut, PromptActor
from envs.tasks import load_splits
from tests.ray.test_prompt import Generator, Predictor
from tests.support.misbehaving import Misbehaving
from trace_async.config import load_config
from trace_async.run.ledger import Ledger
from trace_async.run.state import PendingPrompt
from trace_async.tracking.faults import FaultBook
from trace_async.trees.io import tree_from_json, tree_to_json
from trace_async.types import LossKind, PrefixQuery

RAISES = ("make_raises", "init_raises", "step_raises", "fork_raises", "close_raises", "step_exits", "step_panics")
ODD = ("reward_true", "reward_nan", "metric_true", "metric_none", "content_surrogate", "id_integer", "data_numpy")
MODES = (*RAISES, *ODD, "step_hangs", "init_hangs", "prompt_changes", "prompt_long")


async def test_every_rollout_ends_as_a_reward_or_is_counted_and_every_tree_can_be_read_back(tiny_policy_path: Path):
    config = load_config(
        None,
        [
            "env.name=tests.support.misbehaving:Misbehaving",
            f"env.args={{mode: {'+'.join(MODES)}, every: 40}}",
            "env.step_timeout_s=0.5",
            "env.init_timeout_s=0.5",
            "actors.max_rollout_retries=2",
            "budget.continuations_per_root=1",
        ],
    )
    actor = PromptActor(config, str(tiny_policy_path), Predictor())
    await actor.announce(Generators({"g": Generator()}), {})
    splits = load_splits(Misbehaving(mode="+".join(MODES)))
    ledger, faults = Ledger(), FaultBook()
    for number, task in enumerate(splits.train):
        prompt = PendingPrompt(task_id=task.id, num_roots=4, policy_version=0, root_value=0.5, seed=number)
        ledger.allocate_roots(4)
        tree = await actor.run_prompt(task, prompt)
        ledger.arrive(tree)
        ledger.train(tree)
        faults.enter(tree.faults)
        assert tree_from_json(tree_to_json(tree)) == tree
        assert {rollout.reward for rollout in tree.rollouts} <= {0.0, 1.0}
    ledger.check(waiting=0, in_flight_roots=0)
    assert sum(ledger.trained.values()) > sum(ledger.failed.values())
    assert len(faults.read()) >= 5
    wanted = HeldOut(temperature=1.0, num_samples=1, policy_version=0, tasks_at_once=64)
    evaluated = await actor.evaluate(splits.heldout, wanted)
    assert [tree.task.id for tree in evaluated] == [task.id for task in splits.heldout]
    assert all(len(tree.rollouts) + sum(tree.failures.values()) == 1 for tree in evaluated)
    queries = await actor.prompt_queries(splits.train)
    assert all(isinstance(query, PrefixQuery | LossKind) for query in queries)
    assert sum(isinstance(query, PrefixQuery) for query in queries) > len(queries) / 2
