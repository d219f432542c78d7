"""V(H) from the policy's own hidden states: `predictor.trunk=policy`.

    question ─► trunk (layers of the policy, synced) ─► state, and features beside it ─► head ─► V
                                                         │ kept by the history's tokens, stamped with its version
    finished tree ─► backed-up targets ─► joined with the states of its histories ─► window of rows ─► heads refitted

Where the states come from. The embedded engine computes every history for the turn after it and hands its state on
with the turn, so finished trees bring the states of all their turns, and PromptActors that have the heads answer Stage
2's questions themselves (`Heads.prefix_values`). Prompts of the pool, most of which are never bought, are read by the
trunk, and so are prefixes when the engine gives no states; what was read for a question is kept for the tree to come,
so a training row costs a look-up. The learner's own forward would leave out the trees without credit, those whose
rollouts all agree, which are what the predictor has to tell from the others. States that answer and states that teach
are of one side: the same layers, and the same engine or trunk. What neither the tree brings nor this process was asked
for is read anew, in one forward.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import xxhash
from safetensors.numpy import load_file, save_file

from trace_async.config import PredictorConfig
from trace_async.method.knapsack import FloatArray
from trace_async.method.posterior import Estimates, SuccessEstimator
from trace_async.predictor.heads import HeadName, Heads, fullest, rows_of, vector
from trace_async.predictor.metrics import root_outcomes
from trace_async.predictor.questions import portions, prefix_keys
from trace_async.predictor.states import PolicyTrunk
from trace_async.predictor.targets import backed_up_targets, learnable
from trace_async.trees.tree import ROOT, RolloutTree
from trace_async.types import HiddenState, PrefixQuery
from trace_async.weights import WeightBucket, WeightManifest, WeightUpdate

# Below so many rows a head would only repeat them.
MIN_ROWS = 32
Kind: TypeAlias = Literal["given", "prompt", "prefix"]
_HEADS: tuple[HeadName, ...] = ("prompt", "prefix")
_ROW_FIELDS = ("states", "targets", "weights", "versions", "is_prompt")


@dataclass(frozen=True, slots=True)
class Rows:
    """What the heads are fitted to: `states` [rows, width] (float32, features included); `targets` in [0, 1] and
    `weights` > 0; `versions` (int64) of the policy's weights under which each state was read; `is_prompt`. All [rows].
    """

    states: np.ndarray
    targets: FloatArray
    weights: FloatArray
    versions: np.ndarray
    is_prompt: np.ndarray

    @classmethod
    def none(cls, width: int) -> "Rows":
        empty = np.zeros(0)
        return cls(np.zeros((0, width), np.float32), empty, empty, empty.astype(np.int64), empty.astype(bool))

    def and_more(self, more: "Rows") -> "Rows":
        pairs = ((getattr(self, name), getattr(more, name)) for name in _ROW_FIELDS)
        return Rows(*(np.concatenate(pair) for pair in pairs))

    def arrays(self) -> dict[str, np.ndarray]:
        """Its fields by name; `Rows(**arrays)` makes it again."""
        return {name: getattr(self, name) for name in _ROW_FIELDS}

    def where(self, chosen: np.ndarray) -> "Rows":
        """The rows for which `chosen` [rows] is true."""
        return Rows(*(getattr(self, name)[chosen] for name in _ROW_FIELDS))


class PolicyTrunkPredictor:
    """Trunk, heads, window of rows and per-prompt counts. Not thread-safe; one owner calls it."""

    def __init__(self, config: PredictorConfig, policy_path: str | Path, *, device: str = "cpu") -> None:
        self.config = config
        layers = config.num_layers, config.layers_of_prefixes
        self.trunk = PolicyTrunk(
            policy_path,
            num_layers=max(layers) if all(layers) else 0,
            num_last=config.pooled_tokens,
            device=device,
        )
        self.heads = Heads.untrained(self.trunk.width)
        self.rows = Rows.none(len(self.heads.prefix.weights))
        self.taught = self.rows
        """What the last update's trees added to `rows`."""
        self.asked: dict[bytes, tuple[int, np.ndarray]] = {}
        self.estimator = SuccessEstimator(
            config.prior_strength, fit=config.fit_prior_strength, half_life=config.count_half_life
        )
        self.version = 0
        self.num_updates = 0
        self.num_skipped = 0
        self.busy_s = 0.0

    # ── values ───────────────────────────────────────────────────────────────────────────────────────────────────

    def predict(self, queries: Sequence[PrefixQuery]) -> list[FloatArray]:
        """V at each position of each query: arrays [len(query.positions)]. What is read for it is kept for the trees to
        come, which bring what the engine has read."""
        assert not self.lacks_weights, "a value of old weights must not pass for one of the new"
        started = time.monotonic()
        kinds = [_kind(query) for query in queries]
        found = {
            kind: iter(self._answer(kind, [query for query, own in zip(queries, kinds, strict=True) if own == kind]))
            for kind in set(kinds)
        }
        values = [next(found[kind]) for kind in kinds]
        self.busy_s += time.monotonic() - started
        return values

    def _answer(self, kind: Kind, queries: Sequence[PrefixQuery]) -> list[FloatArray]:
        if kind == "given":
            return self.heads.prefix_values(queries)
        config, found = self.config, list[FloatArray]()
        num_layers = config.num_layers if kind == "prompt" else config.layers_of_prefixes
        for some in portions(queries, [len(query.token_ids) for query in queries], config.max_tokens_per_forward):
            rows = rows_of(some, self.trunk.read(some, num_layers))
            keys = (key for query in some for key in prefix_keys(query))
            self.asked.update((key, (self.trunk.version, row)) for key, row in zip(keys, rows, strict=True))
            ends = np.cumsum([len(query.positions) for query in some])
            found.extend(np.split(self.heads.of(kind).values(rows), ends[:-1]))
        return found

    @property
    def lacks_weights(self) -> bool:
        """After a checkpoint was loaded, until the policy's weights of its version have come."""
        return self.trunk.version < self.version

    def estimate(self, task_ids: Sequence[str], queries: Sequence[PrefixQuery]) -> Estimates:
        """Beta posteriors of prompts: V of each as the prior, the prompt's own counts as evidence."""
        return self.posteriors(task_ids, np.array([value[-1] for value in self.predict(queries)]))

    def posteriors(self, task_ids: Sequence[str], values: FloatArray) -> Estimates:
        """The same with values [prompts] that are known already."""
        return self.estimator.estimate(task_ids, values, self.trunk.version)

    # ── learning ─────────────────────────────────────────────────────────────────────────────────────────────────

    def observe(
        self, trees: Sequence[RolloutTree], policy_version: int, taught: Rows | None = None
    ) -> dict[str, float]:
        """Take in the finished trees of one update; returns how well the values did that were there before.

        Prompts are judged by what the head says of them now, turns by what Stage 2 was told (`Node.value`). `taught`:
        what these trees taught when they were learnt before; nothing is read then.
        """
        started = time.monotonic()
        self.num_skipped += len([tree for tree in trees if tree.rollouts]) - len(learnable(trees))
        trees = learnable(trees)
        self.version = policy_version
        metrics: dict[str, float] = {}
        if taught is None:
            nodes = [_taught_nodes(tree, prefixes=self._learns) for tree in trees]
            metrics = self._keep_states(trees, nodes, policy_version)
            metrics["rows_read_again"] = float(self._read_unasked(trees, nodes))
            taught = self._rows(trees, nodes) if trees else Rows.none(self.rows.states.shape[1])
        self.taught = taught
        if trees:
            values = self.heads.prompt.values(taught.states[taught.is_prompt])
            self.estimator.observe(trees, values, policy_version)
            rows = self.rows.and_more(taught)
            self.rows = rows.where(rows.versions > policy_version - self.config.window_versions)
            metrics |= root_outcomes(trees, [_judged(t, v) for t, v in zip(trees, values, strict=True)]).metrics()
        oldest = policy_version - self.config.window_versions
        self.asked = {key: kept for key, kept in self.asked.items() if kept[0] >= oldest}
        self.busy_s += time.monotonic() - started
        return metrics | self._totals()

    def _totals(self) -> dict[str, float]:
        """What is reported beside the quality of the values."""
        found = {
            "rows": float(len(self.rows.targets)),
            "sync_bytes": float(self.trunk.synced_bytes),
            "sync_s": self.trunk.sync_s,
            "prior_strength": self.estimator.strength,
            "skipped": float(self.num_skipped),
        }
        self.trunk.synced_bytes, self.trunk.sync_s = 0, 0.0
        return found

    def _keep_states(
        self, trees: Sequence[RolloutTree], nodes: Sequence[Mapping[int, bytes]], policy_version: int
    ) -> dict[str, float]:
        """Keep what the engine read. Of the turns that are taught: `states_from_engine`, the share that it read, and
        `state_age`, how many versions ago on average."""
        questions: list[PrefixQuery] = []
        keys: list[bytes] = []
        given: list[HiddenState] = []
        for tree, own in zip(trees, nodes, strict=True):
            for node in own.keys() & tree.states.keys() - {ROOT}:
                questions.append(_question(tree, node))
                keys.append(own[node])
                given.append(tree.states[node])
        if not given:
            return {"states_from_engine": 0.0}
        states = fullest(keys, given)
        versions = [state.policy_version for state in states]
        rows = rows_of(questions, [vector(state) for state in states])
        self.asked.update(zip(keys, zip(versions, rows, strict=True), strict=True))
        num_turns = sum(len(own) - 1 for own in nodes)  # beside the prompt
        return {"states_from_engine": len(given) / num_turns, "state_age": policy_version - float(np.mean(versions))}

    def _read_unasked(self, trees: Sequence[RolloutTree], nodes: Sequence[Mapping[int, bytes]]) -> int:
        """Read the states of taught nodes that nobody asked this process for; returns how many."""
        unasked = [
            _question(tree, node)
            for tree, own in zip(trees, nodes, strict=True)
            for node, key in own.items()
            if key not in self.asked
        ]
        self.predict(unasked)
        return len(unasked)

    def _rows(self, trees: Sequence[RolloutTree], nodes: Sequence[dict[int, bytes]]) -> Rows:
        targets, weights = [], []
        for tree, own in zip(trees, nodes, strict=True):
            values, counts = backed_up_targets(tree)
            # A prompt is taught by its root rollouts alone: continuations were chosen by outcome.
            roots = [rollout.reward for rollout in tree.rollouts if rollout.kind == "root"]
            values[ROOT], counts[ROOT] = np.mean(roots), len(roots)
            targets.append(values[list(own)])
            weights.append(counts[list(own)])
        asked = [self.asked[key] for own in nodes for key in own.values()]
        return Rows(
            states=np.stack([state for _, state in asked]),
            targets=np.concatenate(targets),
            weights=np.concatenate(weights),
            versions=np.array([version for version, _ in asked], dtype=np.int64),
            is_prompt=np.array([node == ROOT for own in nodes for node in own]),
        )

    def steps(self, new: Sequence[RolloutTree]) -> Iterator[Callable[[], float]]:
        """The one step of an update, to be called once: refit the heads on the window; returns the last one's loss."""
        self.num_updates += 1
        num_prompts = int(self.rows.is_prompt.sum())
        if self._learns and max(num_prompts, len(self.rows.is_prompt) - num_prompts) >= MIN_ROWS:
            yield self._refit

    @property
    def _learns(self) -> bool:
        return self.config.steps_per_update > 0

    def _refit(self) -> float:
        started = time.monotonic()
        loss = math.nan
        for kind in _HEADS:
            rows = self.rows.where(self.rows.is_prompt == (kind == "prompt"))
            if len(rows.targets) < MIN_ROWS:
                continue
            head = self.heads.of(kind).refitted(rows.states, rows.targets, rows.weights, l2=self.config.head_l2)
            if head is None:
                self.num_skipped += 1
                continue
            self.heads = self.heads.with_head(kind, head)
            values = head.values(rows.states)
            errors = -(rows.targets * np.log(values) + (1 - rows.targets) * np.log(1 - values))
            loss = float(np.average(errors, weights=rows.weights))
        self.busy_s += time.monotonic() - started
        return loss

    def train(self, trees: Sequence[RolloutTree], policy_version: int) -> dict[str, float]:
        """Take in the trees of one update and learn from them; see `observe`."""
        metrics = self.observe(trees, policy_version)
        losses = [step() for step in self.steps(trees)]
        return metrics | ({"loss": losses[-1]} if losses else {})

    def receive_weights(self, buckets: Sequence[WeightBucket], manifest: WeightManifest) -> int:
        """Read with the policy's new weights from now on; see `PolicyTrunk.receive`. Returns their version."""
        started = time.monotonic()
        self.trunk.receive(buckets, manifest)
        self.busy_s += time.monotonic() - started
        return self.trunk.version

    def learnt(self) -> WeightUpdate:
        """What it has learnt, for replicas that only answer: the heads, numbered by its updates, with a checksum."""
        return self.heads.packed(self.num_updates)

    def take_learnt(self, update: WeightUpdate) -> None:
        """Answer with what another one has learnt; ValueError when it is not what was sent."""
        self.heads = Heads.unpacked(update)
        self.num_updates = update.manifest.policy_version
        self.asked.clear()  # who only answers keeps no rows

    # ── checkpoint ───────────────────────────────────────────────────────────────────────────────────────────────

    def save(self, directory: str | Path) -> None:
        """Heads, window, counts, into `directory` (made); the trunk is the policy's, which the learner saves."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        arrays = self.heads.tensors() | {f"rows/{name}": array for name, array in self.rows.arrays().items()}
        save_file(
            {name: np.ascontiguousarray(array) for name, array in arrays.items()}, directory / "heads.safetensors"
        )
        state = {
            "version": self.version,
            "num_updates": self.num_updates,
            "estimator": self.estimator.state(),
        }
        (directory / "state.json").write_text(json.dumps(state), encoding="utf-8")

    def load(self, directory: str | Path) -> None:
        """Go on from a `save`; answers wait for the policy's weights. ValueError or OSError names what is broken."""
        directory = Path(directory)
        arrays = load_file(directory / "heads.safetensors")
        state = json.loads((directory / "state.json").read_text(encoding="utf-8"))
        self.heads = Heads.of_tensors(arrays)
        self.rows = Rows(**{name: arrays[f"rows/{name}"] for name in _ROW_FIELDS})
        self.version, self.num_updates = state["version"], state["num_updates"]
        self.estimator.load_state(state["estimator"])
        self.asked = {}


def _taught_nodes(tree: RolloutTree, *, prefixes: bool) -> dict[int, bytes]:
    """The prompt and, with `prefixes`, the turns that something follows → the key of each history.

    Of these only whose state the tree brings, and turns of root rollouts whose value was asked for: the rest would have
    to be read for the lesson alone.
    """
    digests: dict[int, xxhash.xxh3_128] = {}
    found: dict[int, bytes] = {}
    for index, node in enumerate(tree.nodes):
        digest = digests[node.before].copy() if node.before >= 0 else xxhash.xxh3_128()
        digest.update(np.array(node.token_ids, dtype=np.int64).tobytes())
        digests[index] = digest
        is_known = index in tree.states or (node.value is not None and tree.rollouts[node.rollout].kind == "root")
        if index == ROOT or (prefixes and tree.children[index] and is_known):
            found[index] = digest.digest()
    return found


def _kind(query: PrefixQuery) -> Kind:
    if query.states:
        return "given"
    return "prefix" if query.turn_logprobs else "prompt"


def _question(tree: RolloutTree, node: int) -> PrefixQuery:
    """What would be asked about the end of this node."""
    tokens = tree.prefix_tokens(node)
    logprobs = tuple(tree.nodes[above].logprobs for above in tree.token_path(node) if above != ROOT)
    prompt_value = tree.nodes[ROOT].value if node != ROOT else None
    return PrefixQuery(token_ids=tokens, positions=(len(tokens),), turn_logprobs=logprobs, prompt_value=prompt_value)


def _judged(tree: RolloutTree, prompt_value: float) -> FloatArray:
    return np.array([prompt_value, *(np.nan if node.value is None else node.value for node in tree.nodes[1:])])
