"""Show a run from its start policy to its end: a live table in a terminal, one short line per update anywhere else.

One bar covers the whole run: start policy, start of the actors, first evaluation, updates, last evaluation. It fills by
time, and the time left is worked out from what updates and evaluations of this run took; it is ? until both were seen.

These metrics are shown; a missing one shows as –. Shares and probabilities are in 0..1. A figure is of the latest
update unless it is called a total. Held-out figures stay until newer ones come:

    train/reward                    mean reward of the trees of the update
    train/effective_ratio           share of its prompts whose leaves disagree; train/prompts_both_outcomes: how many
    train/staleness_mean, _max      weight versions between a tree's oldest token and the update
    tokens/generated_total          all tokens generated for training so far
    learner/trained_tokens          generated tokens with a gradient
    tokens/cached_share             share of prefill tokens served from the KV cache
    heldout/success_t1.0, _t0.0     held-out success at temperature 1 and greedy
    predictor/brier, predictor/auc  of the values used for allocation, against outcomes
    learner/mismatch                mean |learner − generator log-probability| before the update
    learner/loss, learner/grad_norm
    budget/roots, budget/continuations   rollouts spent
    time/step_s and, of it, time/{wait_for_trees, update, predictor, gather, sync, checkpoint}_s
"""

import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from trace_async.printable import printable

PHASES = {
    "wait_for_trees": "waiting",
    "update": "update",
    "predictor": "predictor",
    "gather": "gather",
    "sync": "sync",
    "checkpoint": "checkpoint",
}
NOW = {
    "policy": "making the start policy",
    "start": "starting the actors",
    "stage1": "choosing prompts",
    "wait_for_trees": "waiting for trees",
    "update": "updating the policy",
    "predictor": "training the predictor",
    "gather": "gathering the weights",
    "sync": "sending the weights",
    "checkpoint": "saving a checkpoint",
    "eval": "evaluating",
    "export": "exporting the policy",
    "close": "closing the actors",
}
"""Phases of a run (`trace_async.run.session.Phases`) as they are shown while they go on."""
ANNOUNCED = ("policy", "start", "eval", "export")
"""Of these, what may take minutes without a line of its own: told when it begins, where there is no terminal."""
BEFORE_ANY = ("policy", "start")
"""What comes before the first update or evaluation of a session, and takes seconds or minutes: nobody knows which."""
REDRAW_S = 0.5
RECENT = 10  # the time left is estimated from so many updates
BARS = "▁▂▃▄▅▆▇█"


class Progress:
    """Shows a run of `total_updates` updates.

    The run may end sooner, after `token_budget` generated tokens (0: no such limit). `tokens_before` are those that a
    resumed run had generated before. `eval_every`: updates between the evaluations that training waits for (0: none
    but the first and the last). `clock` gives seconds.
    """

    def __init__(
        self,
        total_updates: int,
        *,
        token_budget: int = 0,
        first_update: int = 0,
        tokens_before: int = 0,
        eval_every: int = 0,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console or Console(file=sys.stdout, highlight=False)
        self._total = total_updates
        self._token_budget = token_budget
        self._clock = clock
        self._update = first_update
        self._tokens = float(tokens_before)
        self._latest: Mapping[str, float] = {}
        self._heldout: dict[str, list[float]] = {}
        self._rewards: deque[float] = deque(maxlen=24)
        self._durations: deque[float] = deque(maxlen=RECENT)
        self._eval_every = eval_every
        self._eval_s: float | None = None
        self._evaluated = -1
        self._now: tuple[str, ...] = ()
        self._announced = ""
        self._said = ""
        self._drawn_at = clock()
        self._recent_tokens: deque[float] = deque(maxlen=RECENT)
        self._last = self._started = clock()
        self._live = (
            Live(console=self._console, auto_refresh=False, transient=False) if self._console.is_terminal else None
        )

    def __enter__(self) -> "Progress":
        self._last = self._started = self._clock()
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def recall(self, update_index: int, metrics: Mapping[str, float]) -> None:
        """Take the figures of an update or evaluation of an earlier session of the run, and show nothing."""
        self._note(update_index, metrics, 0.0)

    def message(self, text: str) -> None:
        """Print a line of its own, above the table."""
        self._console.print(Text(printable(text)), soft_wrap=True)

    def step(self, text: str) -> None:
        """Say how far the phase that goes on has come: beside its name in the table, elsewhere as a line."""
        if self._live is None:
            self.message(text)
        else:
            self._said = printable(text)
            self._draw()

    def phase(self, names: Collection[str]) -> None:
        """Show that these phases go on now, and no others."""
        if any(name in BEFORE_ANY for name in self._now):
            self._last = self._clock()  # what comes next begins now
        self._now = tuple(names)
        self._said = ""
        if self._live is not None:
            if self._clock() - self._drawn_at >= REDRAW_S:
                self._draw()
            return
        for name in self._now:
            if name in ANNOUNCED and name != self._announced:
                self._announced = name
                said = f"{self._name(name)} …  left {_duration(self.seconds_left())}"
                self._console.print(Text(said), soft_wrap=True)

    def update(self, update_index: int, metrics: Mapping[str, float]) -> None:
        """Show that update number `update_index` (the first is 1) is done.

        If `metrics` holds only held-out figures, show that it was evaluated.
        """
        since, self._last = self._last, self._clock()
        self._announced = ""
        if self._note(update_index, metrics, self._last - since):
            said = self.line()
        else:
            said = f"update {update_index}/{self._total}  held-out {self._show_heldout()}"
        if self._live is None:
            self._console.print(Text(said), soft_wrap=True)
        else:
            self._draw()

    def _draw(self) -> None:
        assert self._live is not None
        self._drawn_at = self._clock()
        self._live.update(self.table(), refresh=True)

    def _note(self, update_index: int, metrics: Mapping[str, float], seconds: float) -> bool:
        """Return whether it was an update. `seconds`: what that took, where `metrics` does not say."""
        self._note_heldout(metrics)
        if "time/eval_s" in metrics:
            self._eval_s, self._evaluated = metrics["time/eval_s"], update_index
        if not any(key.startswith("train/") for key in metrics):
            return False
        self._note_update(update_index, metrics, seconds)
        return True

    def _note_update(self, update_index: int, metrics: Mapping[str, float], seconds: float) -> None:
        # Measured by our own clock, the first update would include the start of the actors.
        self._durations.append(metrics.get("time/step_s", seconds))
        self._update = update_index
        self._latest = metrics
        tokens = metrics.get("tokens/generated_total", self._tokens)
        self._recent_tokens.append(tokens - self._tokens)
        self._tokens = tokens
        if "train/reward" in metrics:
            self._rewards.append(metrics["train/reward"])

    def seconds_left(self) -> float | None:
        """Estimate the seconds until the run ends.

        Counted are the updates (or the token budget where it ends first) and the evaluations that training waits for,
        the last one included, each by what it took so far. What is under way counts what is left of its usual time.
        Saving and closing count nothing: they take seconds.

        Returns None while it is not known: before the first update and the first evaluation, while the actors start,
        and when the last thing to be done takes longer than it usually does.
        """
        if not self._durations or any(name in BEFORE_ANY for name in self._now):
            return None
        updates_left = float(max(0, self._total - self._update))
        tokens_per_update = statistics.mean(self._recent_tokens)
        if self._token_budget and tokens_per_update > 0:
            updates_left = min(updates_left, max(0.0, self._token_budget - self._tokens) / tokens_per_update)
        evaluations_left = self._evaluations_left(self._update + updates_left)
        if evaluations_left and self._eval_s is None:
            return None
        step_s, eval_s = statistics.mean(self._durations), self._eval_s or 0.0
        seconds = updates_left * step_s + evaluations_left * eval_s
        evaluates = evaluations_left > 0 and (updates_left == 0 or (self._eval_every > 0 and "eval" in self._now))
        under_way_s = eval_s if evaluates else min(1.0, updates_left) * step_s
        taken_s = self._clock() - self._last
        if seconds > 0 and seconds <= under_way_s < taken_s:
            return None
        return seconds - min(taken_s, under_way_s)

    def _evaluations_left(self, last_update: float) -> int:
        """Return how many evaluations are left between the newest update and the last one, and after that."""
        every = self._eval_every
        between = int(last_update // every - self._update // every) if every else 0
        ends_with_one = bool(every) and last_update % every == 0 and between > 0
        return between + int(not ends_with_one and self._evaluated < last_update)

    def _name(self, phase: str) -> str:
        """Return the phase in words; of evaluations, which one it is."""
        if phase == "eval" and self._evaluated < 0 and self._update == 0:
            return "first evaluation"
        if phase == "eval" and self._update > 0 and self._updates_are_done():
            return "last evaluation"
        return NOW.get(phase, phase)

    def _updates_are_done(self) -> bool:
        return self._update >= self._total or 0 < self._token_budget <= self._tokens

    def line(self) -> str:
        """Describe the run in one line."""
        parts = [
            f"update {self._update}/{self._total}",
            f"success {self._show('train/reward')}",
            f"effective {self._show('train/effective_ratio')} ({self._show('train/prompts_both_outcomes', '.0f')})",
            f"staleness {self._show('train/staleness_mean', '.1f')}/{self._show('train/staleness_max', '.0f')}",
            f"{_thousands(self._tokens)} tokens ({self._speed()}/s)",
        ]
        if self._heldout:
            parts.append("heldout " + " ".join(f"{_NAMES.get(k, k)} {v[-1]:.3f}" for k, v in self._heldout.items()))
        return "  ".join([*parts, f"left {_duration(self.seconds_left())}"])

    def table(self) -> Group:
        """Render the run as a table."""
        head = Table.grid(padding=(0, 2))
        so_far_s, left_s = self._clock() - self._started, self.seconds_left()
        total_s = None if left_s is None else so_far_s + left_s
        # Without a total it moves to and fro.
        bar = ProgressBar(total=total_s, completed=so_far_s, width=32, animation_time=so_far_s)
        left = f"{_duration(so_far_s)} so far, {_duration(left_s)} left"
        head.add_row(Text(f"update {self._update}/{self._total}", style="bold"), bar, left)
        doing = ", ".join(self._name(name) for name in self._now) or "–"
        now = Text(f"now: {doing}" + (f" ({self._said})" if self._said else ""), style="dim")
        grid = Table.grid(padding=(0, 3))
        for style in ("dim", "", "dim", ""):
            grid.add_column(style=style)
        cells = self._cells()
        for i in range(0, len(cells), 2):
            grid.add_row(*cells[i], *(cells[i + 1] if i + 1 < len(cells) else ("", "")))
        return Group(head, now, grid)

    def _cells(self) -> list[tuple[str, str]]:
        show = self._show
        budget = f"{_thousands(self._tokens)}" + (f" of {_thousands(self._token_budget)}" if self._token_budget else "")
        both = f"{show('train/effective_ratio')}   {show('train/prompts_both_outcomes', '.0f')} prompts"
        cached = show("tokens/cached_share", ".0%")
        return [
            ("success of trees", f"{show('train/reward')}  {sparkline(self._rewards)}"),
            ("effective ratio", both),
            ("held-out", self._show_heldout()),
            ("staleness", f"mean {show('train/staleness_mean', '.2f')}  max {show('train/staleness_max', '.0f')}"),
            ("generated tokens", budget),
            ("speed", f"{self._speed()} tokens/s   {cached} cached"),
            ("spent", f"{show('budget/roots', '.0f')} roots  {show('budget/continuations', '.0f')} continuations"),
            ("trained tokens", _thousands(self._latest.get("learner/trained_tokens"))),
            ("time", self._phase_shares()),
            ("predictor", f"Brier {show('predictor/brier', '.3f')}  AUC {show('predictor/auc', '.3f')}"),
            ("learner", f"loss {show('learner/loss', '.4f')}  grad norm {show('learner/grad_norm')}"),
            ("mismatch", show("learner/mismatch", ".1e")),
        ]

    def _phase_shares(self) -> str:
        step_s = self._latest.get("time/step_s", 0.0)
        shares = [
            f"{name} {self._latest[key] / step_s:.0%}"
            for phase, name in PHASES.items()
            if step_s > 0 and self._latest.get(key := f"time/{phase}_s", 0.0) > 0
        ]
        return "  ".join(shares) or "–"

    def _show_heldout(self) -> str:
        entries = []
        for key, values in self._heldout.items():
            change = f"{values[0]:.3f} → {values[-1]:.3f}" if len(values) > 1 else f"{values[0]:.3f}"
            entries.append(f"{_NAMES.get(key, key)} {change}")
        return "   ".join(entries) or "–"

    def _note_heldout(self, metrics: Mapping[str, float]) -> None:
        for key in _NAMES:
            if key in metrics:
                self._heldout.setdefault(key, []).append(metrics[key])

    def _show(self, key: str, form: str = ".2f") -> str:
        return format(self._latest[key], form) if key in self._latest else "–"

    def _speed(self) -> str:
        seconds = sum(self._durations)
        return _thousands(sum(self._recent_tokens) / seconds) if seconds > 0 else "–"


_NAMES = {"heldout/success_t1.0": "t=1", "heldout/success_t0.0": "greedy"}


def sparkline(values: "deque[float] | list[float]") -> str:
    """Draw shares in 0..1 as a row of bars. NaN is left out."""
    return "".join(BARS[min(len(BARS) - 1, max(0, int(value * len(BARS))))] for value in values if value == value)


def _thousands(count: float | None) -> str:
    if count is None:
        return "–"
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if count >= limit:
            size = {"G": 1e9, "M": 1e6, "k": 1e3}[unit]
            return f"{count / size:.1f}{unit}"
    return f"{count:.0f}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
