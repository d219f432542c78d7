"""Tasks before a run: what is odd in them is put right in words or refused, by environment, split and task."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from envs.lazy_tasks import LazyTasks, hold_out
from envs.math.domain import MathFiles
from envs.tasks import heldout_sample, load_splits
from tests.support.misbehaving import Misbehaving
from trace_async.config import ConfigError
from trace_async.env import Env
from trace_async.types import Split, Task


class Domain:
    name = "mine"

    def __init__(self, train: object, heldout: object) -> None:
        self.splits = {"train": train, "heldout": heldout}

    def tasks(self, split: Split) -> Sequence[Task]:
        found = self.splits[split]
        if isinstance(found, Exception):
            raise found
        return found  # type: ignore[return-value]

    def make_env(self, task: Task) -> Env:
        raise NotImplementedError("nothing is played here")


def make(*ids: object, level: int = 0, **data: object) -> list[Task]:
    return [Task(id=i, domain="mine", kind=f"level {level}", data=data or {"of": str(i)}) for i in ids]  # type: ignore


def test_good_tasks_are_handed_on_as_they_are() -> None:
    train, heldout = make("a", "b"), make("c")
    splits = load_splits(Domain(train, heldout))
    assert list(splits.train) == train
    assert list(splits.heldout) == heldout
    assert splits.notes == ()


@pytest.mark.parametrize(
    ("train", "heldout", "words"),
    [
        ([], make("c"), "environment mine: tasks('train'): there are no train tasks"),
        (make("a"), None, "tasks('heldout') gives a NoneType instead of a sequence"),
        (KeyError("file"), make("c"), "tasks('train') raised KeyError"),
        (make("a", "b"), make("c", "b"), "1 of 2 held-out tasks are also trained on, such as b"),
        (make("a", 8), make("8"), "1 of 1 held-out tasks are also trained on, such as 8"),
        ([*make("a", q="what is 1 + 1"), *make("b")], make("c", q="what is 1 + 1"), "hold the data of a task that is"),
        ([*make("a"), "b"], make("c"), "tasks('train')[1]: a task must be a Task, not a str"),
        (make("a", ""), make("c"), "tasks('train')[1] (task ): task.id must be text that is not empty, not ''"),
        (make("a", made={1, 2}), make("c"), "tasks('train')[0] (task a): task.data['made'] must be JSON"),
        (make("a\x1b[2J", x=float("nan")), make("c"), "(task a\\x1b[2J): task.data['x'] must be JSON"),
    ],
)
def test_what_cannot_be_put_right_is_refused_by_name(train: object, heldout: object, words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        load_splits(Domain(train, heldout))


def test_data_that_many_tasks_share_do_not_tell_which_task_it_is() -> None:
    levels = [make(f"{i}", level=i % 2)[0] for i in range(6)]
    shared = [Task(id=t.id, domain="mine", kind="k", data={"level": int(t.id) % 2}) for t in levels]
    heldout = [Task(id="h", domain="mine", kind="k", data={"level": 1})]
    assert len(load_splits(Domain(shared, heldout)).heldout) == 1


def test_an_id_that_comes_twice_is_used_once_and_told() -> None:
    splits = load_splits(Domain(make("a", "b", "a"), make("c")))
    assert [task.id for task in splits.train] == ["a", "b"]
    assert "1 of 3 tasks have an id that another one has" in splits.notes[0]


@pytest.mark.parametrize("mode", ["id_integer", "data_numpy"])
def test_what_has_a_plain_meaning_is_converted_and_the_environment_gets_its_own(mode: str) -> None:
    task = load_splits(Misbehaving(mode=mode)).train[0]
    assert type(task.id) is str
    assert json.loads(json.dumps(task.data)) == task.data
    assert task.original == Misbehaving(mode=mode).tasks("train")[0]  # type: ignore[attr-defined]


def test_tasks_that_are_made_when_asked_for_are_checked_then() -> None:
    train = LazyTasks(100_000, lambda index: make(index)[0])
    splits = load_splits(Domain(train, make("c")))
    assert len(splits.train) == 100_000
    assert splits.train[99_999].id == "99999"
    assert [task.id for task in splits.train[3:5]] == ["3", "4"]
    odd = LazyTasks(1000, lambda index: make(index, x=float("nan"))[0])
    with pytest.raises(ConfigError, match=r"tasks\('train'\)\[\d+\] \(task \d+\): task.data\['x'\]"):
        load_splits(Domain(odd, make("c")))


def test_held_out_tasks_are_a_sample_of_a_sorted_file_the_same_every_time() -> None:
    tasks = [make(f"{i}", level=i // 100)[0] for i in range(600)]
    domain = Domain(make("t"), tasks)
    sample = heldout_sample(domain, tasks, 60)
    assert len({task.id for task in sample}) == 60
    assert {task.kind for task in sample} == {f"level {level}" for level in range(6)}
    assert heldout_sample(domain, tasks, 60) == sample
    assert heldout_sample(domain, tasks, 1000) == tasks
    domain.in_random_order = True  # type: ignore[attr-defined]
    assert heldout_sample(domain, tasks, 60) == tasks[:60]


def test_holding_out_takes_every_level_of_a_sorted_file() -> None:
    tasks = [make(f"{i}", level=i // 100)[0] for i in range(600)]
    train, heldout = hold_out(tasks, 60)
    assert {task.kind for task in train} == {task.kind for task in heldout} == {f"level {level}" for level in range(6)}
    assert sorted((*train, *heldout), key=lambda task: int(task.id)) == tasks


def test_files_that_share_problems_are_refused_and_repeats_are_used_once(tmp_path: Path) -> None:
    path, other = tmp_path / "train.jsonl", tmp_path / "more" / "train.jsonl"
    other.parent.mkdir()
    path.write_text(
        "".join(json.dumps({"problem": f"{i % 8} + 1", "answer": f"{i % 8 + 1}"}) + "\n" for i in range(10))
    )
    other.write_text(json.dumps({"problem": "9 + 1", "answer": "10"}) + "\n")
    with pytest.raises(ConfigError, match="8 of its 8 problems are also in"):
        MathFiles(path=str(path), heldout_path=str(path))
    domain = MathFiles(path=str(path), num_heldout=3)
    assert (len(domain.tasks("train")), len(domain.tasks("heldout"))) == (5, 3)
    splits = load_splits(MathFiles(path=str(path), heldout_path=str(other)))
    assert [task.id for task in splits.heldout] == ["heldout-train-1"]
