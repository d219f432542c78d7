"""Summarise a finished run from its metrics: what improved, and what it cost."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trace_async.printable import one_line
from trace_async.tracking.log import Point

PHASES = {
    "wait_for_trees": "learner waiting for trees",
    "update": "policy update",
    "predictor": "predictor training (beside the update)",
    "estimate": "estimating candidates (beside generation)",
    "gather": "gathering weights",
    "sync": "weight sync",
    "checkpoint": "checkpoints",
}


@dataclass(frozen=True, slots=True)
class Change:
    """One held-out figure before and after training."""

    name: str
    before: float
    after: float


def heldout_changes(points: Sequence[Point]) -> list[Change]:
    """Compare held-out success in the first and the last evaluation, by temperature, domain and level."""
    evaluations = [point for point in points if any(key.startswith("heldout/") for key in point.metrics)]
    if len(evaluations) < 2:
        return []
    first, last = evaluations[0].metrics, evaluations[-1].metrics
    # Of kinds such as "middle-3hop" only the level is shown here.
    shown = ("heldout/success_", "heldout/domain_")
    names = [key for key in last if key.startswith(shown) and key in first and "-" not in key]
    names.sort(key=lambda name: (name.startswith("heldout/domain_"), name))
    return [Change(_shown(name), first[name], last[name]) for name in names]


def _shown(name: str) -> str:
    """Shorten `heldout/success_t1.0/middle` to `t1.0/middle`, `heldout/domain_t1.0/math` to `t1.0/domain math`."""
    what, _, rest = name.removeprefix("heldout/").partition("_")
    return rest if what == "success" else rest.replace("/", "/domain ", 1)


def summarise(points: Sequence[Point]) -> str:
    """Return a few plain lines. A figure covers all updates unless it names a third of them."""
    updates = [point.metrics for point in points if "train/effective_ratio" in point.metrics]
    lines = ["", "Held-out success                      before    after"]
    for change in heldout_changes(points):
        name = change.name.replace("t1.0", "temperature 1").replace("t0.0", "greedy").replace("/", ", ")
        lines.append(
            f"  {one_line(name):<34} {change.before:7.1%}  {change.after:7.1%}  {change.after - change.before:+.1%}"
        )
    if not updates:
        return "\n".join(lines)
    third = max(1, len(updates) // 3)
    lines += [
        "",
        f"Prompts with both outcomes: {_mean(updates[:third], 'train/effective_ratio'):.0%} in the first third of the "
        f"updates, {_mean(updates[-third:], 'train/effective_ratio'):.0%} in the last "
        f"({_mean(updates, 'train/prompts_both_outcomes'):.1f} prompts per update)",
        f"Generated for training: {updates[-1].get('tokens/generated_total', 0):,.0f} tokens, "
        f"{_mean(updates, 'tokens/cached_share'):.0%} of the prefill from the cache"
        f" ({_by_depth(updates)})",
    ]
    step_s = sum(metrics.get("time/step_s", 0.0) for metrics in updates)
    lines.append(f"{len(updates)} updates in {step_s:.0f} s:")
    for phase, name in PHASES.items():
        seconds = sum(metrics.get(f"time/{phase}_s", 0.0) for metrics in updates)
        lines.append(f"  {name:<42} {seconds:7.1f} s  {seconds / max(step_s, 1e-9):6.1%}")
    busy = sum(metrics.get("predictor/busy_s", 0.0) for metrics in updates)
    if busy:
        lines.append(f"  {'predictor, all its work':<42} {busy:7.1f} s  {busy / max(step_s, 1e-9):6.1%}")
    return "\n".join(lines)


def _mean(rows: Sequence[Mapping[str, float]], name: str) -> float:
    values = [row[name] for row in rows if name in row]
    return sum(values) / len(values) if values else float("nan")


def _by_depth(rows: Sequence[Mapping[str, float]]) -> str:
    names = sorted({name for row in rows for name in row if name.startswith("cache/depth_")}, key=_depth)
    return ", ".join(f"turn {_depth(name)}: {_mean(rows, name):.0%}" for name in names)


def _depth(name: str) -> int:
    return int(name.rpartition("_")[2])
