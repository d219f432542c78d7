"""Rules by name, one's own rules, and combinations that mean nothing."""

import subprocess
import sys

import numpy as np
import pytest

from tests.unit.method.test_allocation import two_rollouts
from trace_async.config import BudgetConfig, ConfigError, LossConfig, load_config
from trace_async.method.anchors import find_anchors
from trace_async.method.credit import CreditRule, Term, compute_credit
from trace_async.method.posterior import Estimates
from trace_async.method.registry import (
    AGGREGATION,
    CREDIT,
    OBJECTIVE,
    STAGE1,
    STAGE2,
    aggregation_rule,
    credit_rule,
    objective_rule,
    stage1_rule,
    stage2_rule,
)
from trace_async.method.stage1.rule import Stage1Rule
from trace_async.method.stage2.rule import Stage2Rule

HERE = __name__


class HardestFirst(Stage1Rule):
    uses = frozenset({"explore_share"})

    def plan(self, estimates, num_roots, rng):
        counts = np.zeros(estimates.size, dtype=np.int64)
        counts[np.argsort(estimates.mean)[: num_roots // 2]] = 2
        return counts

    def trains_on(self, tree):
        return len(tree.rollouts) > 1


class Deepest(Stage2Rule):
    needs_values = False
    uses = frozenset()

    def plan(self, anchors, budget, rng):
        counts = np.zeros(len(anchors), dtype=np.int64)
        counts[-1] = budget
        return counts


class RewardOnly(CreditRule):
    def terms(self, tree):
        return [Term(path, tree.rollouts[r].reward, 1 / len(tree.rollouts)) for r, path in tree.branches()]


class NoRule:
    pass


class Unfinished(Stage1Rule):
    pass


def test_rules_of_ones_own_are_named_in_the_settings_and_used():
    config = load_config(
        None,
        [
            f"budget.stage1={HERE}:HardestFirst",
            f"budget.stage2={HERE}:Deepest",
            f"loss.advantage={HERE}:RewardOnly",
            "budget.explore_share=0.1",
        ],
    )
    beliefs = Estimates(np.array([3.0, 1.0, 2.0]), np.array([1.0, 3.0, 2.0]))
    rng = np.random.default_rng(0)
    assert stage1_rule(config.budget).plan(beliefs, 4, rng).tolist() == [0, 2, 2]
    tree = two_rollouts()
    assert stage1_rule(config.budget).trains_on(tree)
    assert stage2_rule(config.budget).plan(find_anchors(tree), 3, rng).tolist() == [0, 0, 3]
    credit = compute_credit(config.loss.advantage, tree)
    assert credit.positive.tolist() == [0, 0.5, 0.5, 0.5, 0, 0]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("budget.stage1=betta", r"budget.stage1=betta: expected one of uniform, dapo, .* did you mean 'beta'\?"),
        ("budget.stage2=kontrast", "did you mean 'contrast'"),
        ("loss.advantage=tree-grpo", "loss.advantage=tree-grpo: .*did you mean 'tree_grpo'"),
        ("loss.objective=pppo", "loss.objective=pppo: .*did you mean 'ppo'"),
        ("loss.aggregation=tokens", "loss.aggregation=tokens: .*did you mean 'token'"),
        (f"loss.objective={HERE}:NoRule", "NoRule must be a subclass of trace_async.method.objective.rule.Objective"),
        ("budget.stage1=quantum", "for one of your own$"),
        ("budget.stage1=no_such_module_of_mine:Rule", "cannot import no_such_module_of_mine: ModuleNotFoundError"),
        (f"budget.stage1={HERE}:Missing", "has no Missing"),
        (f"budget.stage1={HERE}:NoRule", "NoRule must be a subclass of trace_async.method.stage1.rule.Stage1Rule"),
        (f"budget.stage1={HERE}:Deepest", "Deepest must be a subclass of trace_async.method.stage1"),
        (f"budget.stage1={HERE}:Unfinished", "Unfinished must define plan"),
    ],
)
def test_what_is_no_rule_is_refused_in_words(override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(None, [override])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stage1": "uniform", "explore_share": 0.1}, "explore_share=0.1: budget.stage1=uniform ignores it; set 0"),
        ({"stage1": "pcl", "min_rollouts": 1, "pool_size": 64}, "min_rollouts=1: budget.stage1=pcl ignores it"),
        ({"stage2": "none", "max_per_prefix": 2}, "max_per_prefix=2: budget.stage2=none ignores it; set null"),
        ({"stage2": "none", "stage2_rounds": 2}, "stage2_rounds=2: budget.stage2=none ignores it; set 1"),
        ({"stage1": f"{HERE}:HardestFirst", "min_rollouts": 1, "pool_size": 64}, "HardestFirst ignores it"),
        ({"stage1": "uniform", "stage2": "none", "oracle_rollouts": 4}, "oracle_rollouts=4: neither stage1=uniform"),
        ({"stage1": "dapo", "stage2": "random", "oracle_rollouts": 4}, "oracle_rollouts=4: neither"),
        (
            {"stage1": "uniform", "stage2": "contrast", "continuations_per_root": 0, "oracle_rollouts": 4},
            "oracle_rollouts=4: neither",
        ),
    ],
)
def test_settings_that_a_rule_ignores_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        BudgetConfig(**settings)


def test_settings_that_a_rule_obeys_are_taken():
    BudgetConfig(stage1="beta", explore_share=0.1)
    BudgetConfig(stage1="beta", stage2="none", oracle_rollouts=4)
    BudgetConfig(stage1="uniform", stage2="contrast", oracle_rollouts=4)
    BudgetConfig(stage2="random", stage2_rounds=2, max_per_prefix=1)
    LossConfig(advantage="grpo", normalize_std=True)
    with pytest.raises(ConfigError, match=r"normalize_std=True: loss.advantage=tree_grpo ignores it"):
        LossConfig(advantage="tree_grpo", normalize_std=True)
    LossConfig(objective="ppo", dual_clip=3.0)
    with pytest.raises(ConfigError, match=r"loss.dual_clip=3.0: loss.objective=cispo ignores it; set 0"):
        LossConfig(objective="cispo", dual_clip=3.0)


def test_every_named_rule_exists():
    for name in STAGE1:
        stage1_rule(BudgetConfig(stage1=name))
    for name in STAGE2:
        stage2_rule(BudgetConfig(stage2=name))
    for name in CREDIT:
        credit_rule(name)
    for name in OBJECTIVE:
        objective_rule(LossConfig(objective=name))
    for name in AGGREGATION:
        aggregation_rule(name)


def test_reading_settings_loads_nothing_heavy():
    code = "import sys; from trace_async.config import load_config; load_config(); print(*sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert not {"torch", "ray", "scipy", "transformers", "mlflow", "deepspeed"} & set(loaded)
