"""Rules by name: built in, or `package.module:Class` of one's own.

Whoever needs a rule asks here and then looks only at what the rule says of itself (`needs_estimates`, `needs_values`,
`uses` …): no name of a rule is compared anywhere else. To add one, write a class in a file and name it below; to use
one of your own without touching this package, name it in the settings as `package.module:Class`.

A rule's module is imported when the rule is asked for, so reading the names costs nothing.
"""

import difflib
import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trace_async.method.aggregation import Aggregation
    from trace_async.method.credit.rule import CreditRule
    from trace_async.method.market import Offer
    from trace_async.method.objective.rule import Objective
    from trace_async.method.settings import BudgetSettings, LossSettings
    from trace_async.method.stage1.rule import Stage1Rule
    from trace_async.method.stage2.rule import Stage2Rule

STAGE1 = {
    "uniform": "trace_async.method.stage1.groups:Uniform",
    "dapo": "trace_async.method.stage1.groups:Dapo",
    "pcl": "trace_async.method.stage1.groups:Pcl",
    "thompson": "trace_async.method.stage1.groups:Thompson",
    "vip": "trace_async.method.stage1.variance:Vip",
    "point": "trace_async.method.stage1.active:Point",
    "beta": "trace_async.method.stage1.active:Beta",
    "price": "trace_async.method.stage1.active:Price",
}
STAGE2 = {
    "none": "trace_async.method.stage2.none:NoContinuations",
    "random": "trace_async.method.stage2.random:Random",
    "contrast": "trace_async.method.stage2.contrast:Contrast",
    "contrast_per_token": "trace_async.method.stage2.contrast:ContrastPerToken",
    "topup": "trace_async.method.stage2.price:TopUp",
    "price": "trace_async.method.stage2.price:Price",
    "contrast_value_only": "trace_async.method.stage2.contrast:ContrastValueOnly",
}
CREDIT = {
    "trace": "trace_async.method.credit.trace:Trace",
    "trace_fresh": "trace_async.method.credit.trace:TraceFresh",
    "grpo": "trace_async.method.credit.grpo:Grpo",
    "gigpo": "trace_async.method.credit.gigpo:GiGpo",
    "tree_grpo": "trace_async.method.credit.tree_grpo:TreeGrpo",
    "treepo": "trace_async.method.credit.treepo:TreePo",
    "tree_rpo": "trace_async.method.credit.tree_rpo:TreeRpo",
}
OBJECTIVE = {
    "ppo": "trace_async.method.objective.ppo:Ppo",
    "cispo": "trace_async.method.objective.cispo:Cispo",
}
AGGREGATION = {
    "constant": "trace_async.method.aggregation:Constant",
    "token": "trace_async.method.aggregation:Token",
    "sequence": "trace_async.method.aggregation:PerSequence",
    "prompt": "trace_async.method.aggregation:Prompt",
}


class UnknownRuleError(ValueError):
    """No such rule, or what was named is none; the message says what to do but not in which setting it stood."""


def stage1_class(name: str) -> "type[Stage1Rule]":
    """The class of `budget.stage1`. Raises UnknownRuleError."""
    from trace_async.method.stage1.rule import Stage1Rule

    found: type[Stage1Rule] = _find(name, STAGE1, Stage1Rule)
    return found


def stage2_class(name: str) -> "type[Stage2Rule]":
    """The class of `budget.stage2`. Raises UnknownRuleError."""
    from trace_async.method.stage2.rule import Stage2Rule

    found: type[Stage2Rule] = _find(name, STAGE2, Stage2Rule)
    return found


def credit_class(name: str) -> "type[CreditRule]":
    """The class of `loss.advantage`. Raises UnknownRuleError."""
    from trace_async.method.credit.rule import CreditRule

    found: type[CreditRule] = _find(name, CREDIT, CreditRule)
    return found


def objective_class(name: str) -> "type[Objective]":
    """The class of `loss.objective`. Raises UnknownRuleError."""
    from trace_async.method.objective.rule import Objective

    found: type[Objective] = _find(name, OBJECTIVE, Objective)
    return found


def aggregation_class(name: str) -> "type[Aggregation]":
    """The class of `loss.aggregation`. Raises UnknownRuleError."""
    from trace_async.method.aggregation import Aggregation

    found: type[Aggregation] = _find(name, AGGREGATION, Aggregation)
    return found


def stage1_rule(settings: "BudgetSettings", num_rounds: int | None = None) -> "Stage1Rule":
    """The rule that spends the round after `num_rounds` rounds (None: long after the warm-up).

    A rule that needs estimates is preceded by `budget.warmup_rounds` rounds of small groups, for there to be estimates.
    """
    rule = stage1_class(settings.stage1)(settings)
    if rule.needs_estimates and num_rounds is not None and num_rounds < settings.warmup_rounds:
        from trace_async.method.stage1.groups import WarmUp

        return WarmUp(settings)
    return rule


def stage2_rule(settings: "BudgetSettings", offer: "Offer | None" = None) -> "Stage2Rule":
    """The rule that spends the continuations of one prompt; `offer`: what the market says to it."""
    return stage2_class(settings.stage2)(settings, offer)


def credit_rule(name: str, *, normalize_std: bool = False) -> "CreditRule":
    """The rule that turns finished trees into credit."""
    return credit_class(name)(normalize_std=normalize_std)


def objective_rule(settings: "LossSettings") -> "Objective":
    """The rule that says what a token gains by its ratio."""
    return objective_class(settings.objective)(settings)


def aggregation_rule(name: str, *, divisor_tokens: float = 64.0) -> "Aggregation":
    """The rule by which a batch's credits are scaled."""
    return aggregation_class(name)(divisor_tokens=divisor_tokens)


def _find(name: str, built_in: Mapping[str, str], base: type) -> Any:
    module_name, colon, class_name = built_in.get(name, name).partition(":")
    if not (colon and module_name and class_name):
        near = difflib.get_close_matches(name, built_in, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise UnknownRuleError(
            f"expected one of {', '.join(built_in)}, or package.module:Class for one of your own{hint}"
        )
    try:
        module = importlib.import_module(module_name)
    # Somebody else's module: whatever it raises while it is imported is for its author to read.
    except Exception as error:
        raise UnknownRuleError(f"cannot import {module_name}: {type(error).__name__}: {error}") from error
    found = getattr(module, class_name, None)
    if found is None:
        raise UnknownRuleError(f"module {module_name} has no {class_name}")
    if not (isinstance(found, type) and issubclass(found, base)):
        raise UnknownRuleError(f"{class_name} must be a subclass of {base.__module__}.{base.__name__}")
    missing: frozenset[str] = getattr(found, "__abstractmethods__", frozenset())
    if missing:
        raise UnknownRuleError(f"{class_name} must define {', '.join(sorted(missing))}")
    return found
