import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trace_async.trees.io import read_trees, tree_files, tree_from_json, tree_to_json, trees_path, write_trees
from trace_async.trees.tree import Fault, Node, Rollout, RolloutKind, RolloutTree
from trace_async.types import Task, VersionSpan

finite = st.floats(allow_nan=False, allow_infinity=False)
any_text = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=8)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | finite | any_text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(any_text, inner, max_size=3),
    max_leaves=5,
)


@st.composite
def nodes(draw: st.DrawFn, parent: int, rollout: int) -> Node:
    token_ids = tuple(draw(st.lists(st.integers(0, 200_000), max_size=5)))
    num_generated = 0 if parent < 0 else draw(st.integers(0, len(token_ids)))
    starts = [0, *draw(st.lists(st.integers(1, num_generated), max_size=2))] if num_generated else []
    return Node(
        parent=parent,
        rollout=rollout,
        token_ids=token_ids,
        num_generated=num_generated,
        logprobs=tuple(draw(finite) for _ in range(num_generated)),
        version_spans=tuple(VersionSpan(start, draw(st.integers(0, 99))) for start in sorted(starts)),
        value=draw(st.none() | finite),
        prompt_tokens=draw(st.integers(0, 999)),
        cached_tokens=draw(st.integers(0, 999)),
    )


@st.composite
def trees(draw: st.DrawFn) -> RolloutTree:
    grown = [draw(nodes(-1, -1))]
    rollouts: list[Rollout] = []
    for index in range(draw(st.integers(0, 4))):
        leaves = {rollout.leaf for rollout in rollouts}
        anchors = [n for n in range(1, len(grown)) if n not in leaves]
        anchor = draw(st.sampled_from([0, *anchors]))
        parent = anchor
        for _ in range(draw(st.integers(1, 3))):
            grown.append(draw(nodes(parent, index)))
            parent = len(grown) - 1
        kind: RolloutKind = "continuation" if anchor else "root"
        metrics = draw(st.dictionaries(any_text, finite, max_size=2))
        bought = draw(st.integers(0, 3)) if anchor else 0
        rollouts.append(
            Rollout(kind=kind, anchor=anchor, leaf=parent, reward=draw(finite), metrics=metrics, round=bought)
        )
    return RolloutTree(
        task=Task(
            id=draw(any_text),
            domain=draw(any_text),
            kind=draw(any_text),
            data=draw(st.dictionaries(any_text, json_values, max_size=3)),
        ),
        nodes=tuple(grown),
        rollouts=tuple(rollouts),
        policy_version_started=draw(st.integers(0, 99)),
        num_roots_allocated=draw(st.integers(0, 99)),
        num_continuations_allocated=draw(st.integers(0, 99)),
        faults={draw(any_text): Fault(draw(st.integers(1, 9)), draw(any_text)) for _ in range(draw(st.integers(0, 2)))},
        failures=draw(st.dictionaries(any_text, st.integers(0, 9), max_size=2)),
    )


@given(trees())
@settings(deadline=None)
def test_reading_gives_back_the_same_tree(tree: RolloutTree) -> None:
    line = tree_to_json(tree)
    assert "\n" not in line
    assert tree_from_json(line) == tree
    assert tree_to_json(tree_from_json(line)) == line


def small_tree(reward: float = 1.0) -> RolloutTree:
    return RolloutTree(
        task=Task(id="t1", domain="multihop", kind="2-hop", data={"answer": "Ada\u2028\n"}),
        nodes=(
            Node(parent=-1, rollout=-1, token_ids=(1, 2), num_generated=0),
            Node(
                parent=0,
                rollout=0,
                token_ids=(3, 4, 5),
                num_generated=2,
                logprobs=(-0.1, -2.5),
                version_spans=(VersionSpan(0, 7), VersionSpan(1, 8)),
                value=0.25,
            ),
        ),
        rollouts=(Rollout(kind="root", anchor=0, leaf=1, reward=reward, metrics={"f1": 0.5}),),
        failures={"timeout": 1},
    )


def test_a_file_keeps_trees_in_order_and_is_replaced_whole(tmp_path: Path) -> None:
    path = trees_path(tmp_path, 12)
    write_trees(path, [small_tree(1.0), small_tree(0.0)])
    assert [tree.rollouts[0].reward for tree in read_trees(path)] == [1.0, 0.0]
    with pytest.raises(ValueError, match="rollout 0: reward must be a finite number, not nan"):
        write_trees(path, [small_tree(0.5), small_tree(float("nan"))])
    assert [tree.rollouts[0].reward for tree in read_trees(path)] == [1.0, 0.0]
    assert [file.name for file in path.parent.iterdir()] == ["update_000012.jsonl"]
    write_trees(trees_path(tmp_path, 3), [])
    assert [file.name for file in tree_files(tmp_path)] == ["update_000003.jsonl", "update_000012.jsonl"]


def broken(**changes: object) -> str:
    record = json.loads(tree_to_json(small_tree()))
    for path, value in changes.items():
        target = record
        *parents, last = path.split("__")
        for name in parents:
            target = target[int(name) if name.isdigit() else name]
        if value is KeyError:
            del target[last]
        else:
            target[last] = value
    return json.dumps(record)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "Expecting property name"),
        ("[1]", "tree: expected an object, found list"),
        ("[" * 100_000, "nested too deeply"),
        (broken(format=1), "format 1 is not 2"),
        (broken(task=KeyError), "tree: task is missing"),
        (broken(task__id=5), "task: id must be text, not 5"),
        (broken(nodes__1__token_ids=["3", 4, 5]), "node 1: token_ids must be an integer, not '3'"),
        (broken(nodes__1__token_ids=[True, 4, 5]), "node 1: token_ids must be an integer, not True"),
        (broken(nodes__1__logprobs=[-0.1]), "2 generated tokens but 1 log-probabilities"),
        (broken(nodes__1__version_spans=[[0]]), "node 1: version_spans must be pairs"),
        (broken(nodes__1__parent=1), "node 1: parent 1 must come before it"),
        (broken(rollouts__0__kind="leaf"), "rollout 0: kind 'leaf' is neither"),
        (broken(rollouts__0__reward=float("nan")), "NaN is not a finite number"),
        (broken(rollouts__0__metrics={"f1": "x"}), "rollout 0: metrics.f1 must be a number"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "trees.jsonl"
    path.write_text(tree_to_json(small_tree()) + "\n" + line + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=message) as caught:
        list(read_trees(path))
    assert f"{path}:2: " in str(caught.value)


def test_bytes_that_are_not_text_are_named(tmp_path: Path) -> None:
    path = tmp_path / "trees.jsonl"
    path.write_bytes(b"\xff\xfe\n")
    with pytest.raises(ValueError, match=r"trees\.jsonl:1: .*utf-8"):
        list(read_trees(path))


@pytest.mark.parametrize("plain", [True, 1, np.float32(1.0), np.int64(1)])
def test_whatever_plainly_is_a_number_is_written_so_that_it_is_read_back(plain: object) -> None:
    tree = small_tree(plain)  # type: ignore[arg-type]
    assert tree_from_json(tree_to_json(tree)).rollouts[0].reward == 1.0


def test_what_could_not_be_read_back_is_refused_by_its_field() -> None:
    tree = small_tree(1.0)
    odd = replace(tree, task=replace(tree.task, id=8))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"task\.id must be text, not 8"):
        tree_to_json(odd)
    with pytest.raises(ValueError, match="rollout 0: reward must be a finite number, not None"):
        tree_to_json(small_tree(None))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="is not JSON serializable"):
        tree_to_json(replace(tree, task=replace(tree.task, data={"made": {1, 2}})))  # type: ignore[dict-item]
