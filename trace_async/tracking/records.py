"""What trackers show besides figures: some rollouts, turn by turn, and the datasets of a run."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random

import xxhash

from trace_async.printable import one_line, printable
from trace_async.trees.text import Decode, NodeView, view_nodes
from trace_async.trees.tree import ROOT, RolloutTree
from trace_async.types import Json, Task

MAX_CHARS = 20_000
"""Of one text of a rollout; of a longer one the beginning is kept."""
_DIGESTED_IDS = 1_000


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnRecord:
    """One turn of the policy and what came back; or, without a turn, a context that the rollout went on in."""

    said: str
    observation: str
    num_prompt_tokens: int
    num_generated: int
    figures: Mapping[str, Json]
    """Value, mean log-probability, policy versions and the like, by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutRecord:
    """One rollout of an update, in words. Control characters are made visible."""

    update: int
    task_id: str
    domain: str
    kind: str
    """root or continuation."""
    prompt: str
    turns: tuple[TurnRecord, ...]
    reward: float
    metrics: Mapping[str, float]
    """What the environment said of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetRecord:
    """The tasks of one split."""

    name: str
    digest: str
    """Of their number and the first ids: two runs with the same digest were given the same tasks."""
    num_tasks: int
    source: str
    """The environment and its arguments, as JSON."""
    use: str
    """training or evaluation."""


def sample_rollouts(
    trees: Sequence[RolloutTree], count: int, decode: Decode, *, update: int, seed: int
) -> list[RolloutRecord]:
    """Draw `count` of the update's rollouts, each as likely as another and the same ones for the same seed."""
    rollouts = [(tree, index) for tree in trees for index in range(len(tree.rollouts))]
    chosen = Random(f"{seed}-{update}").sample(rollouts, min(count, len(rollouts)))
    return [rollout_record(tree, index, decode, update=update) for tree, index in chosen]


def rollout_record(tree: RolloutTree, index: int, decode: Decode, *, update: int) -> RolloutRecord:
    """Return rollout `index` of `tree` in words, from the task's prompt to its end."""
    rollout = tree.rollouts[index]
    path = []
    node = rollout.leaf
    while node != ROOT:
        path.append(node)
        node = tree.nodes[node].parent
    views = view_nodes(tree, decode)
    return RolloutRecord(
        update=update,
        task_id=one_line(str(tree.task.id)),
        domain=one_line(tree.task.domain),
        kind=rollout.kind,
        prompt=printable(views[ROOT].observation, MAX_CHARS),
        turns=tuple(_turn(tree, views[node]) for node in reversed(path)),
        reward=rollout.reward,
        metrics=rollout.metrics,
    )


def _turn(tree: RolloutTree, view: NodeView) -> TurnRecord:
    versions: list[Json] = [*view.versions]
    figures: dict[str, Json] = {
        "value": view.value,
        "mean_logprob": view.mean_logprob,
        "policy_versions": versions,
        "cached_share": view.cached_share,
    }
    return TurnRecord(
        said=printable(view.generated, MAX_CHARS),
        observation=printable(view.observation, MAX_CHARS),
        num_prompt_tokens=tree.nodes[view.index].prompt_tokens,
        num_generated=view.num_generated,
        figures=figures,
    )


def dataset_record(env_name: str, env_args: Mapping[str, object], tasks: Sequence[Task], use: str) -> DatasetRecord:
    """Describe one split of an environment's tasks."""
    ids = [str(tasks[index].id) for index in range(min(_DIGESTED_IDS, len(tasks)))]
    return DatasetRecord(
        name=one_line(env_name, 100),
        digest=xxhash.xxh64_hexdigest(json.dumps([len(tasks), ids]).encode()),
        num_tasks=len(tasks),
        source=json.dumps({"env.name": env_name, "env.args": dict(env_args)}, default=str, sort_keys=True),
        use=use,
    )
