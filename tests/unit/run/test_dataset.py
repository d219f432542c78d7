"""The order of tasks, and rows read from files."""

import copy
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trace_async.run.dataset import TaskIterator, read_json, read_rows
from trace_async.types import Task


def make_tasks(count: int) -> list[Task]:
    return [Task(id=str(i), domain="d", kind="k", data={}) for i in range(count)]


@given(st.integers(1, 12), st.lists(st.integers(0, 15), max_size=8), st.integers(0, 3))
def test_every_task_comes_once_per_epoch(count: int, sizes: list[int], seed: int) -> None:
    iterator = TaskIterator(make_tasks(count), seed=seed)
    taken = [task.id for size in sizes for task in iterator.take(size)]
    assert len(taken) == sum(sizes)
    for start in range(0, len(taken), count):
        epoch = taken[start : start + count]
        assert len(set(epoch)) == len(epoch)


@given(st.integers(1, 12), st.lists(st.integers(0, 15), max_size=8), st.integers(0, 3))
def test_a_pool_holds_each_task_once_and_every_epoch_every_task(count: int, sizes: list[int], seed: int) -> None:
    iterator = TaskIterator(make_tasks(count), seed=seed)
    taken = []
    for size in sizes:
        pool = [task.id for task in iterator.pool(size)]
        assert len(pool) == len(set(pool)) == min(size, count)
        taken += pool
        resumed = TaskIterator(make_tasks(count), seed=seed)
        resumed.load_state(json.loads(json.dumps(iterator.state())))
        assert resumed.pool(7) == copy.deepcopy(iterator).pool(7)
    for start in range(0, len(taken), count):
        epoch = taken[start : start + count]
        assert len(set(epoch)) == len(epoch)


@given(st.integers(1, 12), st.integers(0, 40), st.integers(0, 40))
def test_it_goes_on_where_its_state_was_taken(count: int, before: int, after: int) -> None:
    iterator = TaskIterator(make_tasks(count), seed=1)
    iterator.take(before)
    state = iterator.state()
    resumed = TaskIterator(make_tasks(count), seed=1)
    resumed.load_state(state)
    assert resumed.take(after) == iterator.take(after)


def test_order_depends_on_seed_and_epoch() -> None:
    tasks = make_tasks(20)
    one, same, other = (TaskIterator(tasks, seed=seed) for seed in (0, 0, 1))
    first = one.take(20)
    assert same.take(20) == first
    assert other.take(20) != first
    assert one.take(20) != first


def test_a_foreign_state_is_refused() -> None:
    state = TaskIterator(make_tasks(3), seed=0).state()
    with pytest.raises(ValueError, match="seed=0, this run has 1"):
        TaskIterator(make_tasks(3), seed=1).load_state(state)
    with pytest.raises(ValueError, match="num_tasks=3, this run has 4"):
        TaskIterator(make_tasks(4), seed=0).load_state(state)
    with pytest.raises(ValueError, match="no tasks"):
        TaskIterator([], seed=0)


def test_rows_of_arrays_and_lines(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"q": "x"}, {"q": "y"}]')
    (tmp_path / "b.jsonl").write_text('{"q": "x\u2028"}\n\n{"q": "y"}\n')
    assert read_rows(tmp_path / "a.json", {"q": str}) == [{"q": "x"}, {"q": "y"}]
    assert read_rows(tmp_path / "b.jsonl", {"q": str}) == [{"q": "x\u2028"}, {"q": "y"}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"q": "x"}\n{"q": }\n', r"f\.json:2: not JSON"),
        ('{"q": "x"}\n[1]\n', r"f\.json:2: expected an object, found list"),
        ('{"q": "x"}\n{"p": 1}\n', r"f\.json:2: field 'q' is missing; there are p"),
        ('{"q": 1}\n', r"f\.json:1: field 'q' must be str, found int"),
        ('[{"q": "x"},\n {"q": }]', r"f\.json:2: not JSON"),
        ('[{"q": "x"}, {"q": null}]', r"f\.json, row 2: field 'q' must be str, found NoneType"),
        ("", r"f\.json: no rows"),
        ("[]", r"f\.json: no rows"),
    ],
)
def test_bad_rows_are_named_by_file_and_line(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "f.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_rows(tmp_path / "f.json", {"q": str})


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.json: no such file"):
        read_json(tmp_path / "none.json")
    (tmp_path / "latin.json").write_bytes(b'"\xe9"')
    with pytest.raises(ValueError, match=r"latin\.json: not UTF-8"):
        read_json(tmp_path / "latin.json")
