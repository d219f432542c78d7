"""Which combinations of rules and settings mean nothing, by what the rules say of themselves."""

from collections.abc import Iterator

from trace_async.method.registry import (
    UnknownRuleError,
    aggregation_class,
    credit_class,
    objective_class,
    stage1_class,
    stage2_class,
)
from trace_async.method.settings import BudgetSettings, LossSettings

Fault = tuple[str, object, str]
"""(setting, its value, what is wrong and what to do)."""


def budget_faults(settings: BudgetSettings) -> Iterator[Fault]:
    """What is wrong with `budget`: unknown rules, and settings that the chosen rules would ignore."""
    try:
        stage1 = stage1_class(settings.stage1)
    except UnknownRuleError as error:
        yield "budget.stage1", settings.stage1, str(error)
        return
    try:
        stage2 = stage2_class(settings.stage2)
    except UnknownRuleError as error:
        yield "budget.stage2", settings.stage2, str(error)
        return
    optional: list[tuple[str, object, str, frozenset[str]]] = [
        ("explore_share", 0, f"stage1={settings.stage1}", stage1.uses),
        ("min_rollouts", 0, f"stage1={settings.stage1}", stage1.uses),
        ("max_per_prefix", None, f"stage2={settings.stage2}", stage2.uses),
        ("stage2_rounds", 1, f"stage2={settings.stage2}", stage2.uses),
    ]
    for name, off, rule, uses in optional:
        # null leaves it to the rule, and 0 is as good as off.
        if getattr(settings, name) not in (off, None) and name not in uses:
            words = f"budget.{rule} ignores it; set {'null' if off is None else off}"
            yield f"budget.{name}", getattr(settings, name), words
    if settings.continuations != "always" and not stage2.forks:
        words = f"budget.stage2={settings.stage2} buys none; set always"
        yield "budget.continuations", settings.continuations, words
    asks = stage1.needs_estimates or (stage2.needs_values and stage2.forks and settings.continuations_per_root)
    if settings.oracle_rollouts and not asks:
        words = f"neither stage1={settings.stage1} nor stage2={settings.stage2} asks for a value to be measured; set 0"
        yield "budget.oracle_rollouts", settings.oracle_rollouts, words


def loss_faults(settings: LossSettings) -> Iterator[Fault]:
    """What is wrong with `loss`: unknown rules, and settings that the chosen rules would ignore."""
    try:
        credit = credit_class(settings.advantage)
        if settings.normalize_std and not credit.normalizes:
            yield "loss.normalize_std", True, f"loss.advantage={settings.advantage} ignores it; set false"
    except UnknownRuleError as error:
        yield "loss.advantage", settings.advantage, str(error)
    try:
        objective = objective_class(settings.objective)
        if settings.dual_clip and "dual_clip" not in objective.uses:
            yield "loss.dual_clip", settings.dual_clip, f"loss.objective={settings.objective} ignores it; set 0"
    except UnknownRuleError as error:
        yield "loss.objective", settings.objective, str(error)
    try:
        aggregation_class(settings.aggregation)
    except UnknownRuleError as error:
        yield "loss.aggregation", settings.aggregation, str(error)
