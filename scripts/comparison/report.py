"""The report of a comparison: what each method reached at equal generated tokens, what it cost, how sure that is."""

import math
from collections.abc import Callable, Mapping, Sequence

from scripts.comparison.arithmetic import (
    Curve,
    Interval,
    bootstrap_mean,
    common_budget,
    cost_to_reach,
    make_curve,
    mean_curve,
    mean_height,
    paired_differences,
    student_mean,
    truncated,
    value_at,
)
from scripts.comparison.charts import Axis, Series, line_chart
from scripts.comparison.document import Block, Chart, Details, Heading, Paragraph, Table
from scripts.comparison.plan import SECONDS, Figures, RunFigures

Row = Mapping[str, float]
DIFFERENCE_COLUMNS = ("pairs", "end [bootstrap] (t)", "area [bootstrap] (t)")
METRIC_NAMES = {"heldout/success_t1.0": "temperature 1", "heldout/success_t0.0": "greedy"}


def build_report(figures: Figures, base_config: str) -> tuple[str, list[Block]]:
    """Title and blocks. Raises ValueError when no run has been evaluated."""
    comparison = figures.comparison
    budget = compared_budget(figures)
    blocks: list[Block] = [*_introduction(figures, budget)]
    for metric in comparison.success:
        if any(run.curve(metric) for run in figures.runs):
            blocks += _success_section(figures, metric, budget)
    blocks += _effective_section(figures, budget)
    blocks += [Heading("What it cost"), _cost_table(figures, budget), Paragraph(_COST_NOTE)]
    blocks += [Heading("Predictor"), _predictor_table(figures, budget)]
    blocks += _settings(figures, base_config)
    return f"Comparison {comparison.name}", blocks


def compared_budget(figures: Figures) -> float:
    """Generated tokens at which all runs are cut: those of the comparison, or of the run that ends soonest."""
    curves = [curve for run in figures.runs if (curve := run.curve(figures.comparison.success[0])) is not None]
    if not curves:
        raise ValueError(f"no run has figures of {figures.comparison.success[0]}")
    return common_budget(curves, figures.comparison.max_generated_tokens)


def cut_curves(figures: Figures, method: str, metric: str, budget: float) -> dict[int, Curve]:
    """Per seed, the held-out curve of a method up to `budget` generated tokens."""
    curves = {run.seed: run.curve(metric) for run in figures.of(method)}
    return {seed: truncated(curve, budget) for seed, curve in curves.items() if curve is not None}


def metric_name(metric: str) -> str:
    """Name a metric in words: `heldout/success_t1.0/middle` → `temperature 1, middle`."""
    for key, name in METRIC_NAMES.items():
        if metric == key or metric.startswith(key + "/"):
            return name + metric[len(key) :].replace("/", ", ")
    return metric


def _introduction(figures: Figures, budget: float) -> list[Block]:
    comparison = figures.comparison
    seeds = ", ".join(map(str, comparison.seeds))
    text = [
        f"{len(comparison.methods)} methods, seeds {seeds}, from the same start policy, each cut at {budget:,.0f} "
        "generated tokens (straight lines between evaluations). Warm-up of the predictor and rollouts that were "
        "lost or filtered are charged; evaluation is not."
    ]
    if budget < comparison.max_generated_tokens:
        text.append(f"The shortest run ends there; {comparison.max_generated_tokens:,} were asked for.")
    done = {(run.method, run.seed) for run in figures.runs}
    missing = [f"{m} seed {s}" for m in comparison.methods for s in comparison.seeds if (m, s) not in done]
    if missing:
        text.append(f"Not finished, and left out: {', '.join(missing)}.")
    return [
        Paragraph(" ".join(text)),
        Paragraph(
            "Intervals are 95 % over seeds: [bootstrap] is the percentile bootstrap, too narrow with few seeds "
            "(three: it covers about 70 %); (t) is Student's, the careful one. Differences are within each seed."
        ),
        Paragraph(f"Command: {figures.command}. Machine: {figures.machine}."),
    ]


# ── held-out success ─────────────────────────────────────────────────────────────────────────────────────────────


def _success_section(figures: Figures, metric: str, budget: float) -> list[Block]:
    name = metric_name(metric)
    slug = metric.replace("/", "_").replace(".", "")
    y = Axis("held-out success", percent=True)
    tokens = _chart(figures, lambda run: _cut(run.curve(metric), budget), Axis("generated tokens"), y)
    seconds = _chart(figures, lambda run: run.curve(metric, SECONDS), Axis("seconds of training"), y)
    return [
        Heading(f"Held-out success, {name}"),
        Chart(f"{slug}_tokens", f"Held-out success ({name}) against generated tokens; thin: single seeds", tokens),
        _success_table(figures, metric, budget),
        Paragraph(
            f"End: at {budget:,.0f} tokens. Area: mean height of the curve up to there. Tokens to baseline: where the "
            f"mean curve reaches what {figures.comparison.label(figures.comparison.baseline)} ends with."
        ),
        _baseline_table(figures, metric, budget),
        *([_ours_table(figures, metric, budget)] if figures.comparison.ours else []),
        Chart(f"{slug}_seconds", f"Held-out success ({name}) against seconds of training (no evaluation)", seconds),
    ]


def _cut(curve: Curve | None, budget: float) -> Curve | None:
    return None if curve is None else truncated(curve, budget)


def _success_table(figures: Figures, metric: str, budget: float) -> Table:
    comparison = figures.comparison
    cut = {method: cut_curves(figures, method, metric, budget) for method in comparison.methods}
    starts = [curve.value[0] for curves in cut.values() for curve in curves.values()]
    rows = [["ReAct (no training)", "", _percent(sum(starts) / len(starts)), "", ""]]
    baseline = list(cut[comparison.baseline].values())
    level = sum(curve.value[-1] for curve in baseline) / len(baseline) if baseline else math.nan
    ends, areas = [sum(starts) / len(starts)], [-math.inf]
    for method, curves in cut.items():
        if not curves:
            rows.append([comparison.label(method), "0", "", "", ""])
            ends.append(-math.inf)
            areas.append(-math.inf)
            continue
        end = bootstrap_mean([curve.value[-1] for curve in curves.values()])
        area = bootstrap_mean([mean_height(curve) for curve in curves.values()])
        needed = cost_to_reach(mean_curve(list(curves.values()), budget), level)
        reached = f"{needed:,.0f} ({needed / budget:.0%})" if math.isfinite(needed) else "never"
        reached = "" if math.isnan(level) else reached
        rows.append([comparison.label(method), str(len(curves)), _share(end), _share(area), reached])
        ends.append(end.mean)
        areas.append(area.mean)
    best = frozenset({(ends.index(max(ends)), 2), (areas.index(max(areas)), 3)})
    return Table(["method", "runs", "end [bootstrap]", "area [bootstrap]", "tokens to baseline"], rows, best)


def _baseline_table(figures: Figures, metric: str, budget: float) -> Table:
    """Return every method less the baseline."""
    baseline = figures.comparison.baseline
    head = f"paired difference to {figures.comparison.label(baseline)}, points"
    return _difference_table(
        figures, head, baseline, lambda other: _difference(figures, metric, budget, other, baseline)
    )


def _ours_table(figures: Figures, metric: str, budget: float) -> Table:
    """Our method less every other."""
    ours = figures.comparison.ours
    head = f"{figures.comparison.label(ours)} less the other, paired, points"
    return _difference_table(figures, head, ours, lambda theirs: _difference(figures, metric, budget, ours, theirs))


def _difference_table(figures: Figures, head: str, fixed: str, cells_of: Callable[[str], list[str]]) -> Table:
    """Return a row for every method but `fixed` that shares a seed with it."""
    comparison = figures.comparison
    others = [method for method in comparison.methods if method != fixed]
    rows = [[comparison.label(method), *cells] for method in others if (cells := cells_of(method))]
    return Table([head, *DIFFERENCE_COLUMNS], rows)


def _difference(figures: Figures, metric: str, budget: float, ours: str, theirs: str) -> list[str]:
    """Number of seeds that both have, difference at the end, difference in area; nothing without such a seed."""
    our_curves, their_curves = (cut_curves(figures, method, metric, budget) for method in (ours, theirs))
    shared = our_curves.keys() & their_curves.keys()
    if not shared:
        return []
    cells = [str(len(shared))]
    for measure in (lambda curve: float(curve.value[-1]), mean_height):
        differences = paired_differences(
            {seed: measure(curve) for seed, curve in our_curves.items()},
            {seed: measure(curve) for seed, curve in their_curves.items()},
        )
        cells.append(_points(bootstrap_mean(differences), student_mean(differences)))
    return cells


# ── effective ratio ──────────────────────────────────────────────────────────────────────────────────────────────


def _effective_section(figures: Figures, budget: float) -> list[Block]:
    def by_update(metric: str) -> Callable[[RunFigures], Curve | None]:
        def curve(run: RunFigures) -> Curve | None:
            found = [(row["step"], row[metric]) for row in run.updates(budget) if metric in row]
            return make_curve(*zip(*found, strict=True)) if found else None

        return curve

    blocks: list[Block] = []
    for slug, metric, caption, axis in (
        ("effective_ratio", "train/effective_ratio", "Effective ratio", Axis("prompts with both outcomes", True)),
        ("both_outcomes", "train/prompts_both_outcomes", "Prompts with both outcomes", Axis("prompts per update")),
    ):
        svg = _chart(figures, by_update(metric), Axis("update"), axis)
        if svg:
            blocks.append(Chart(slug, f"{caption} by update, mean over seeds", svg))
    if not blocks:
        return []
    note = "Of the prompts trained on: dynamic sampling (DAPO) filters the others, and pays for them in tokens."
    return [Heading("Prompts with both outcomes"), *blocks, _effective_table(figures, budget), Paragraph(note)]


def _effective_table(figures: Figures, budget: float) -> Table:
    rows = []
    for method in figures.comparison.methods:
        runs = [updates for run in figures.of(method) if (updates := run.updates(budget))]
        if not runs:
            continue
        row = [figures.comparison.label(method)]
        for metric, show in (("train/effective_ratio", _percent), ("train/prompts_both_outcomes", _one_digit)):
            for part in (_first_third, _last_third, list):
                values = [_mean(part(updates), metric) for updates in runs]
                row.append(show(sum(values) / len(values)))
        rows.append(row)
    columns = [f"{name}, {part}" for name in ("ratio", "prompts") for part in ("first third", "last third", "all")]
    return Table(["method", *columns], rows)


# ── cost and predictor ───────────────────────────────────────────────────────────────────────────────────────────

_COST_NOTE = (
    "Means over runs, up to the common budget. Trajectory equivalents count a continuation as half a rollout. "
    "Lost: rollouts that broke down, by no fault of the policy's; filtered: by the selection rule. Mismatch: "
    "mean |log-probability of engine and learner|, the largest of any update."
)


def _cost_table(figures: Figures, budget: float) -> Table:
    def seconds(run: RunFigures) -> float:
        curve = run.curve(SECONDS)
        return value_at(curve, budget) if curve is not None else math.nan

    columns: list[tuple[str, Callable[[RunFigures], float], str]] = [
        ("updates", lambda run: len(run.updates(budget)), ".0f"),
        ("roots / update", lambda run: _mean(run.updates(budget), "budget/roots"), ".1f"),
        ("continuations / update", lambda run: _mean(run.updates(budget), "budget/continuations"), ".1f"),
        ("trajectory equivalents", lambda run: _sum(run.updates(budget), "budget/trajectory_equivalents"), ",.0f"),
        ("tokens / update", lambda run: budget / max(1, len(run.updates(budget))), ",.0f"),
        ("seconds", seconds, ".0f"),
        ("prefill cached", lambda run: _mean(run.updates(budget), "tokens/cached_share"), ".0%"),
        ("staleness", lambda run: _mean(run.updates(budget), "train/staleness_mean"), ".2f"),
        ("lost", lambda run: _last(run.updates(budget), "budget/failed_rollouts"), ".0f"),
        ("filtered", lambda run: _last(run.updates(budget), "budget/filtered_rollouts"), ".0f"),
        ("mismatch", lambda run: _max(run.updates(budget), "learner/mismatch"), ".1e"),
    ]
    return _method_table(figures, columns)


def _predictor_table(figures: Figures, budget: float) -> Table:
    def share(run: RunFigures) -> float:
        updates = run.updates(budget)
        return _sum(updates, "predictor/busy_s") / max(1e-9, _sum(updates, "time/step_s"))

    columns: list[tuple[str, Callable[[RunFigures], float], str]] = [
        ("busy seconds", lambda run: _sum(run.updates(budget), "predictor/busy_s"), ".1f"),
        ("share of training time", share, ".1%"),
        ("Brier, first third", lambda run: _mean(_first_third(run.updates(budget)), "predictor/brier"), ".3f"),
        ("Brier, last third", lambda run: _mean(_last_third(run.updates(budget)), "predictor/brier"), ".3f"),
        ("AUC, first third", lambda run: _mean(_first_third(run.updates(budget)), "predictor/auc"), ".3f"),
        ("AUC, last third", lambda run: _mean(_last_third(run.updates(budget)), "predictor/auc"), ".3f"),
    ]
    return _method_table(figures, columns)


def _method_table(figures: Figures, columns: Sequence[tuple[str, Callable[[RunFigures], float], str]]) -> Table:
    rows = []
    for method in figures.comparison.methods:
        runs = figures.of(method)
        if runs:
            means = [(sum(read(run) for run in runs) / len(runs), form) for _, read, form in columns]
            rows.append([figures.comparison.label(method), *("–" if math.isnan(v) else f"{v:{f}}" for v, f in means)])
    return Table(["method", *(name for name, _, _ in columns)], rows)


def _settings(figures: Figures, base_config: str) -> list[Block]:
    comparison = figures.comparison
    rows = [[comparison.label(name), "  ".join(method.overrides)] for name, method in comparison.methods.items()]
    wall = "\n".join(f"{name:<40} {seconds:8.0f} s" for name, seconds in figures.wall_s.items())
    return [
        Heading("Settings"),
        Table(["method", "differs from the base config by"], rows),
        Details(f"Base config with the overrides of all methods ({comparison.base})", base_config),
        Details("Wall time of each run, with start, evaluation and end", wall),
    ]


# ── helpers ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _chart(figures: Figures, read: Callable[[RunFigures], Curve | None], x: Axis, y: Axis) -> str:
    """Mean and single curves of each method; empty when there is nothing to draw."""
    series = []
    for number, method in enumerate(figures.comparison.methods):
        curves = [curve for run in figures.of(method) if (curve := read(run)) is not None]
        if curves:
            series.append(Series(figures.comparison.label(method), number, mean_curve(curves, math.inf), curves))
    return line_chart(series, x, y) if series else ""


def _first_third(updates: Sequence[Row]) -> Sequence[Row]:
    return updates[: max(1, len(updates) // 3)]


def _last_third(updates: Sequence[Row]) -> Sequence[Row]:
    return updates[-max(1, len(updates) // 3) :]


def _values(rows: Sequence[Row], key: str) -> list[float]:
    return [row[key] for row in rows if key in row and math.isfinite(row[key])]


def _mean(rows: Sequence[Row], key: str) -> float:
    values = _values(rows, key)
    return sum(values) / len(values) if values else math.nan


def _sum(rows: Sequence[Row], key: str) -> float:
    return sum(_values(rows, key)) if _values(rows, key) else math.nan


def _last(rows: Sequence[Row], key: str) -> float:
    return _values(rows, key)[-1] if _values(rows, key) else math.nan


def _max(rows: Sequence[Row], key: str) -> float:
    return max(_values(rows, key), default=math.nan)


def _percent(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.1%}"


def _one_digit(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.1f}"


def _share(interval: Interval) -> str:
    bounds = "" if math.isnan(interval.low) else f" [{interval.low:.1%}, {interval.high:.1%}]"
    return f"{interval.mean:.1%}{bounds}"


def _points(bootstrap: Interval, student: Interval) -> str:
    if math.isnan(bootstrap.low):
        return f"{bootstrap.mean * 100:+.1f}"
    return (
        f"{bootstrap.mean * 100:+.1f} [{bootstrap.low * 100:+.1f}, {bootstrap.high * 100:+.1f}] "
        f"({student.low * 100:+.1f}, {student.high * 100:+.1f})"
    )
