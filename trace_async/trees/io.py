"""Write rollout trees as JSON lines, one tree a line, and read them back.

A run keeps trees in this form to look at, and a checkpoint its buffer. As in the tree itself, the record of a node
holds only the tokens that the node adds. Reading gives back an equal tree: floats are written as their shortest exact
decimal, as Python prints them. A line that is not a valid tree raises an error that names file and line. Nothing is
ever unpickled or evaluated.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias, cast

from trace_async.trees.tree import Fault, Node, Rollout, RolloutKind, RolloutTree
from trace_async.types import Json, Task, VersionSpan

FORMAT = 2
Record: TypeAlias = "dict[str, Json]"


def trees_path(run_dir: str | Path, update: int) -> Path:
    """Return the file in which a run keeps trees of update `update`.

    Every update has a file of its own, so that a resumed run overwrites what it does again.
    """
    return Path(run_dir) / "trees" / f"update_{update:06d}.jsonl"


def tree_files(run_dir: str | Path) -> list[Path]:
    """Return the files that hold a run's trees, oldest update first."""
    return sorted((Path(run_dir) / "trees").glob("update_*.jsonl"))


def heldout_path(run_dir: str | Path, update: int, temperature: float, set_name: str = "") -> Path:
    """Return the file in which a run keeps the held-out rollouts of an evaluation after update `update`.

    `set_name`: of which of `eval.sets` they are.
    """
    of_set = f"_{set_name}" if set_name else ""
    return Path(run_dir) / "trees" / f"heldout_{update:06d}_t{float(temperature)}{of_set}.jsonl"


def heldout_files(run_dir: str | Path) -> list[Path]:
    """Return the files that hold a run's held-out rollouts, oldest update first."""
    return sorted((Path(run_dir) / "trees").glob("heldout_*.jsonl"))


def write_trees(path: str | Path, trees: Iterable[RolloutTree]) -> None:
    """Write `trees` to a file, one a line.

    The file is replaced in one step, so that a reader sees either the whole old file or the whole new one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with unfinished.open("w", encoding="utf-8") as file:
            for tree in trees:
                file.write(tree_to_json(tree) + "\n")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def read_trees(path: str | Path) -> Iterator[RolloutTree]:
    """Yield the trees of a file in order, reading as it goes. Raises ValueError, which names file and line."""
    with Path(path).open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield tree_from_json(line.decode("utf-8"))
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {error}") from error


def tree_to_json(tree: RolloutTree) -> str:
    """Return the tree as one line.

    Raises ValueError, which names the field, when something could not be read back. No tree of ours holds such a
    thing, because whatever an environment gives is made plain before (rollout/values.py).
    """
    for field in ("id", "domain", "kind"):
        if not isinstance(getattr(tree.task, field), str):
            raise ValueError(f"task.{field} must be text, not {getattr(tree.task, field)!r}")
    record = {
        "format": FORMAT,
        "task": {"id": tree.task.id, "domain": tree.task.domain, "kind": tree.task.kind, "data": tree.task.data},
        "policy_version_started": tree.policy_version_started,
        "num_roots_allocated": tree.num_roots_allocated,
        "num_continuations_allocated": tree.num_continuations_allocated,
        "failures": dict(tree.failures),
        "faults": {name: [fault.count, fault.words] for name, fault in tree.faults.items()},
        "nodes": [_node_record(node) for node in tree.nodes],
        "rollouts": [
            {
                "kind": r.kind,
                "anchor": r.anchor,
                "leaf": r.leaf,
                "reward": _finite(r.reward, f"rollout {number}: reward"),
                "metrics": {n: _finite(v, f"rollout {number}: metrics.{n}") for n, v in r.metrics.items()},
                "round": r.round,
            }
            for number, r in enumerate(tree.rollouts)
        ],
    }
    try:
        return json.dumps(record, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    except TypeError as error:
        raise ValueError(f"task {tree.task.id!r}: {error}") from error


def _finite(value: float, name: str) -> float:
    """Return a bool, a number or a numpy scalar as a float. Raises ValueError when it is not a finite number."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{name} must be a finite number, not {value!r}")
    return number


def tree_from_json(line: str) -> RolloutTree:
    """Return the tree of one line. Raises ValueError, which says what is wrong with the line."""
    try:
        # Python's JSON reads NaN and Infinity unless it is told not to.
        record = _Reader(json.loads(line, parse_constant=_refuse_constant), "tree")
    except RecursionError as error:  # how the parser gives up on deep nesting
        raise ValueError("tree: nested too deeply") from error
    if record.integer("format") != FORMAT:
        raise ValueError(f"tree: format {record.integer('format')} is not {FORMAT}, the one this version reads")
    task = _Reader(record.value("task"), "task")
    return RolloutTree(
        task=Task(id=task.text("id"), domain=task.text("domain"), kind=task.text("kind"), data=task.mapping("data")),
        nodes=tuple(_read_node(_Reader(v, f"node {i}")) for i, v in enumerate(record.list("nodes"))),
        rollouts=tuple(_read_rollout(_Reader(v, f"rollout {i}")) for i, v in enumerate(record.list("rollouts"))),
        policy_version_started=record.integer("policy_version_started"),
        num_roots_allocated=record.integer("num_roots_allocated"),
        num_continuations_allocated=record.integer("num_continuations_allocated"),
        failures={kind: _integer(count, f"failures.{kind}") for kind, count in record.mapping("failures").items()},
        faults={name: _read_fault(value, f"faults.{name}") for name, value in record.mapping("faults").items()},
    )


def _read_fault(value: Json, name: str) -> Fault:
    pair = _list(value, name)
    if len(pair) != 2 or not isinstance(pair[1], str):
        raise ValueError(f"{name} must be a pair [count, words]")
    return Fault(_integer(pair[0], name), pair[1])


def _node_record(node: Node) -> Mapping[str, object]:
    context = {} if node.follows is None else {"follows": node.follows}  # left out, since few trees have it
    seconds = {"seconds": round(node.seconds, 4)} if node.seconds else {}
    return {
        "parent": node.parent,
        "rollout": node.rollout,
        "token_ids": node.token_ids,
        "num_generated": node.num_generated,
        "logprobs": node.logprobs,
        "version_spans": [(span.start, span.policy_version) for span in node.version_spans],
        "value": node.value,
        "prompt_tokens": node.prompt_tokens,
        "cached_tokens": node.cached_tokens,
        **seconds,
        **context,
    }


def _read_node(record: "_Reader") -> Node:
    spans = [record.integers(f"version_spans[{i}]", pair) for i, pair in enumerate(record.list("version_spans"))]
    if any(len(span) != 2 for span in spans):
        raise ValueError(f"{record.name}: version_spans must be pairs [start, policy_version]")
    return Node(
        parent=record.integer("parent"),
        rollout=record.integer("rollout"),
        token_ids=record.integers("token_ids"),
        num_generated=record.integer("num_generated"),
        logprobs=record.numbers("logprobs"),
        version_spans=tuple(VersionSpan(start, version) for start, version in spans),
        value=None if record.value("value") is None else record.number("value"),
        prompt_tokens=record.integer("prompt_tokens"),
        cached_tokens=record.integer("cached_tokens"),
        seconds=record.number("seconds") if record.has("seconds") else 0.0,
        follows=record.integer("follows") if record.has("follows") else None,
    )


def _read_rollout(record: "_Reader") -> Rollout:
    kind = record.text("kind")
    if kind not in ("root", "continuation"):
        raise ValueError(f"{record.name}: kind {kind!r} is neither 'root' nor 'continuation'")
    metrics = record.mapping("metrics")
    return Rollout(
        kind=cast(RolloutKind, kind),
        anchor=record.integer("anchor"),
        leaf=record.integer("leaf"),
        reward=record.number("reward"),
        metrics={name: _number(value, f"{record.name}: metrics.{name}") for name, value in metrics.items()},
        round=record.integer("round"),
    )


class _Reader:
    """Give typed access to one JSON object. Every error names the record and the field."""

    def __init__(self, record: Json, name: str) -> None:
        if not isinstance(record, dict):
            raise ValueError(f"{name}: expected an object, found {type(record).__name__}")
        self._record = record
        self.name = name

    def has(self, field: str) -> bool:
        return field in self._record

    def value(self, field: str) -> Json:
        if field not in self._record:
            raise ValueError(f"{self.name}: {field} is missing")
        return self._record[field]

    def integer(self, field: str) -> int:
        return _integer(self.value(field), f"{self.name}: {field}")

    def number(self, field: str) -> float:
        return _number(self.value(field), f"{self.name}: {field}")

    def text(self, field: str) -> str:
        value = self.value(field)
        if not isinstance(value, str):
            raise ValueError(f"{self.name}: {field} must be text, not {value!r}")
        return value

    def mapping(self, field: str) -> Record:
        value = self.value(field)
        if not isinstance(value, dict):
            raise ValueError(f"{self.name}: {field} must be an object, not {type(value).__name__}")
        return value

    def list(self, field: str) -> Sequence[Json]:
        return _list(self.value(field), f"{self.name}: {field}")

    def integers(self, field: str, value: Json = None) -> tuple[int, ...]:
        name = f"{self.name}: {field}"
        values = _list(self.value(field) if value is None else value, name)
        return tuple(_integer(entry, name) for entry in values)

    def numbers(self, field: str) -> tuple[float, ...]:
        return tuple(_number(entry, f"{self.name}: {field}") for entry in self.list(field))


def _list(value: Json, name: str) -> Sequence[Json]:
    if not isinstance(value, list):
        raise ValueError(f"{name} must be a list, not {type(value).__name__}")
    return value


def _integer(value: Json, name: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool):  # in Python a bool is an int too
        raise ValueError(f"{name} must be an integer, not {value!r}")
    return value


def _number(value: Json, name: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError(f"{name} must be a number, not {value!r}")
    return float(value)


def _refuse_constant(constant: str) -> float:
    raise ValueError(f"{constant} is not a finite number")
