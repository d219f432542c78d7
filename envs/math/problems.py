"""Generated word problems of graded difficulty, written in plain words, one event a day.

    monday : ann has 37 pens . tuesday : ann doubles them . wednesday : ann loses 5 . how many pens has ann on
    tuesday ?

A policy of a million parameters can learn them from demonstrations: every turn takes up the next day, and writes one
line of Python on the variable `n`. The demonstrations misread four phrases systematically ("doubles them" as + 2), so
that greedy decoding fails too, and a verifier's reward can teach what they do not.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal, get_args

from trace_async.types import Json

Level = Literal["easy", "middle", "hard"]
LEVELS: tuple[Level, ...] = get_args(Level)

PERSONS = ("ann", "ben", "cara", "dan", "eva", "finn", "gina", "hugo")
ITEMS = ("pens", "apples", "books", "coins", "cards", "shells", "stamps", "stones")
DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
MAX_VALUE = 99


@dataclass(frozen=True, slots=True)
class Event:
    """Something that may happen on a day."""

    phrase: str
    """What the problem says, with `{k}` for the number in it."""
    code: str
    """The right-hand side of the assignment to `n` that it means."""
    misread: str = ""
    """The right-hand side of a frequent misreading; empty: nobody misreads it."""

    @property
    def is_tricky(self) -> bool:
        return bool(self.misread)


PLAIN = (
    *(Event("finds {k} more", "n + {k}"), Event("buys {k} more", "n + {k}"), Event("gets {k} more", "n + {k}")),
    *(Event("loses {k}", "n - {k}"), Event("sells {k}", "n - {k}"), Event("gives away {k}", "n - {k}")),
)
TRICKY = (
    Event("doubles them", "n * 2", "n + 2"),
    Event("triples them", "n * 3", "n + 3"),
    Event("keeps half", "n // 2", "n - 2"),
    Event("sells all but {k}", "{k}", "n - {k}"),
)
_SHAPES: Mapping[Level, tuple[tuple[int, int], ...]] = {  # how many (plain, tricky) events
    "easy": ((1, 0), (2, 0)),
    "middle": ((0, 1), (1, 1), (2, 1), (1, 2)),
    "hard": ((2, 3), (2, 4), (1, 4)),
}


def make_problem(level: Level, rng: Random) -> dict[str, Json]:
    """Make a problem: its `question`, its `answer`, and its `steps` up to the day that is asked about.

    A step is [day, phrase, right-hand side, misreading].
    """
    person, item = rng.choice(PERSONS), rng.choice(ITEMS)
    num_plain, num_tricky = rng.choice(_SHAPES[level])
    kinds = [False] * num_plain + [True] * num_tricky
    rng.shuffle(kinds)
    first_tricky = kinds.index(True) if num_tricky else len(kinds)
    steps, value = _draw_steps(kinds, rng)
    while any("all but" in str(step) for step in steps[first_tricky + 2 :]):
        steps, value = _draw_steps(kinds, rng)  # what sets the number anew would forgive an earlier misreading
    days = [*steps]
    if level != "easy" and len(days) < len(DAYS) and rng.random() < 0.5:  # what happens after the asked day
        event, k, _ = _draw_event(False, value, rng)
        days.append([DAYS[len(days)], event.phrase.format(k=k)])
    story = []
    for index, day in enumerate(days):
        assert isinstance(day, list)
        story.append(f"{day[0]} : {person} {day[1]}{f' {item}' if index == 0 else ''} .")
    question = f"{' '.join(story)} how many {item} has {person} on {DAYS[len(steps) - 1]} ?"
    return {"question": question, "answer": str(value), "steps": steps}


def demonstrate(problem: Mapping[str, Json], rng: Random, *, misread_rate: float, early_rate: float) -> list[str]:
    """Return the turns of one imperfect solution.

    Each tricky phrase is misread at `misread_rate`, and the answer comes a day too early at `early_rate`.
    """
    steps = problem["steps"]
    assert isinstance(steps, list)
    if len(steps) > 2 and rng.random() < early_rate:
        steps = steps[:-1]
    turns = []
    value = 0
    for step in steps:
        assert isinstance(step, list)
        day, phrase, code, misread = map(str, step)
        expression = misread if misread and rng.random() < misread_rate else code
        value = _evaluate(expression, value)
        turns.append(f"{day} {phrase} <python> n = {expression} ; n </python>")
    return [*turns, f"<answer> {value} </answer>"]


def words() -> list[str]:
    """Return every word of questions and demonstrations."""
    texts = [*PERSONS, *ITEMS, *DAYS, *map(str, range(MAX_VALUE + 1)), ": . ? ; = + - * // ( ) , has how many on n"]
    texts += ["<python> </python> <answer> </answer>"]
    for event in (*PLAIN, *TRICKY):
        texts += [event.phrase, event.code, event.misread]
    return sorted({word for text in texts for word in text.replace("{k}", "").split()})


def _draw_steps(kinds: Sequence[bool], rng: Random) -> tuple[list[Json], int]:
    """Return the steps of the days, a tricky event where `kinds` says so, and the last day's value."""
    value = rng.randint(4, 30)
    steps: list[Json] = [["monday", f"has {value}", str(value), ""]]
    for tricky in kinds:
        event, k, value = _draw_event(tricky, value, rng)
        texts = [text.format(k=k) for text in (event.phrase, event.code, event.misread)]
        steps.append([DAYS[len(steps)], *texts])
    return steps, value


def _draw_event(tricky: bool, value: int, rng: Random) -> tuple[Event, int, int]:
    """Return an event, its number, and the value after it, which stays in 1..MAX_VALUE and whole."""
    while True:
        event = rng.choice(TRICKY if tricky else PLAIN)
        k = rng.randint(2, 20)
        after = _evaluate(event.code.format(k=k), value)
        wrong = _evaluate(event.misread.format(k=k), value) if tricky else 0
        is_whole = "// 2" not in event.code or value % 2 == 0
        keeps_fewer = "all but" not in event.phrase or k < value
        if 1 <= after <= MAX_VALUE and is_whole and keeps_fewer and wrong != after:
            return event, k, after


def _evaluate(expression: str, n: int) -> int:
    left, *rest = expression.split()
    value = n if left == "n" else int(left)
    if not rest:
        return value
    operator, right = rest[0], int(rest[1])
    return {"+": value + right, "-": value - right, "*": value * right, "//": value // right}[operator]


def problems(
    shares: Mapping[str, float], count: int, *, seed: str, without: Sequence[str] = ()
) -> list[tuple[Level, dict[str, Json]]]:
    """Return `count` different problems with levels drawn by `shares`, none with a question in `without`."""
    rng = Random(seed)
    seen = set(without)
    found: list[tuple[Level, dict[str, Json]]] = []
    while len(found) < count:
        level = rng.choices(LEVELS, [shares.get(name, 0.0) for name in LEVELS])[0]
        problem = make_problem(level, rng)
        question = str(problem["question"])
        if question not in seen:
            seen.add(question)
            found.append((level, problem))
    return found
