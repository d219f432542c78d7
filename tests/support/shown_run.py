"""A run's directory with trees to look at, as training leaves it: for the tests of `tree` and of the viewer."""

from collections.abc import Sequence
from pathlib import Path

from trace_async.config import config_to_yaml, load_config
from trace_async.policy.small_tokenizer import build_tokenizer
from trace_async.tracking.log import Point, write_metrics
from trace_async.trees.io import trees_path, write_trees
from trace_async.trees.tree import Fault, Node, Rollout, RolloutTree
from trace_async.types import Task, VersionSpan

HOSTILE = (
    "</script><script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">\x1b]0;t\x07\u202e"
)
WORDS = ["who", "made", "it", "ada", "bob", "answer", "search", "found", HOSTILE]


class ShownRun:
    """Writes a run into `directory`; `tree` builds its trees with texts of `WORDS` (others by character)."""

    def __init__(self, directory: Path, name: str = "shown") -> None:
        self.directory = directory
        self.tokenizer = build_tokenizer(WORDS)
        policy = directory / "policy"
        self.tokenizer.save_pretrained(policy)
        (policy / "config.json").write_text('{"model_type": "qwen3"}')
        config = load_config(None, ["loss.advantage=trace", f"name={name}", "budget.stage2=contrast"])
        (directory / "config.yaml").write_text(config_to_yaml(config))

    def ids(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def turn(self, parent: int, rollout: int, said: str, seen: str = "", value: float | None = None) -> Node:
        generated = self.ids(said)
        return Node(
            parent=parent,
            rollout=rollout,
            token_ids=generated + self.ids(seen),
            num_generated=len(generated),
            logprobs=tuple(-0.5 for _ in generated),
            version_spans=(VersionSpan(0, 7),),
            value=value,
            prompt_tokens=10,
            cached_tokens=8,
        )

    def tree(self, task_id: str = "q7", said: str = "answer bob", kind: str = "2-hop") -> RolloutTree:
        """Rollouts 0 (turns 1, 2) and 1 (turn 3) fail; a continuation after turn 1 (turns 4, 5) succeeds."""
        return RolloutTree(
            task=Task(id=task_id, domain="multihop", kind=kind, data={}),
            nodes=(
                Node(parent=-1, rollout=-1, token_ids=self.ids("who made it"), num_generated=0, value=0.25),
                self.turn(0, 0, "search ada", "found bob", 0.625),
                self.turn(1, 0, said),
                self.turn(0, 1, "answer it"),
                self.turn(1, 2, "search bob", "found ada", 0.875),
                self.turn(4, 2, "answer ada"),
            ),
            rollouts=(
                Rollout(kind="root", anchor=0, leaf=2, reward=0.0),
                Rollout(kind="root", anchor=0, leaf=3, reward=0.0),
                Rollout(kind="continuation", anchor=1, leaf=5, reward=1.0, metrics={"f1": 0.75}),
            ),
            policy_version_started=6,
            num_roots_allocated=2,
            num_continuations_allocated=1,
            failures={"timeout": 2},
            faults={"step.env": Fault(3, f"no server{HOSTILE}")},
        )

    def lost(self, task_id: str, kind: str = "1-hop") -> RolloutTree:
        """Two root rollouts of one turn that fail."""
        return RolloutTree(
            task=Task(id=task_id, domain="multihop", kind=kind, data={}),
            nodes=(
                Node(parent=-1, rollout=-1, token_ids=self.ids("who made it"), num_generated=0, value=0.5),
                *(self.turn(0, rollout, "answer it") for rollout in range(2)),
            ),
            rollouts=tuple(Rollout(kind="root", anchor=0, leaf=leaf, reward=0.0) for leaf in (1, 2)),
            num_roots_allocated=2,
        )

    def write(self, update: int, trees: Sequence[RolloutTree]) -> None:
        write_trees(trees_path(self.directory, update), trees)

    def write_curves(self, values: Sequence[float], name: str = "train/reward") -> None:
        """`values[i]` after update i + 1."""
        write_metrics(self.directory, [Point(i, float(i), {name: value}) for i, value in enumerate(values, 1)])
