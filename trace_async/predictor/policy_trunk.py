"""V(H) from the policy's own hidden states: `predictor.trunk=policy`.

    question ─► trunk (first layers of the policy, synced) ─► state, and features beside it ─► head ─► V
                                                               │ kept by the history's tokens, stamped with its version
    finished tree ─► backed-up targets ─► joined with the states of its questions ─► window of rows ─► heads refitted

Prompts and prefixes have a head each: what makes a question hard shows otherwise than what makes a rollout fail.

Where the states come from. The embedded engine computes every history for the turn after it and hands its state on
with the turn, so Stage 2's questions bring their states, finished trees bring those of all their turns, and no prefix
is read twice. Prompts of the pool, most of which are never bought, are read by the trunk, and so are prefixes when the
engine gives no states; what was read for a question is kept for the tree to come, so a training row costs a look-up.
The learner's own forward would leave out the trees without credit, those whose rollouts all agree, which are what the
predictor has to tell from the others. States that answer and states that teach are of one side: the same layers, and
the same engine or trunk. What neither the tree brings nor this process was asked for is read anew, in one forward.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import xxhash
from safetensors.numpy import load_file, save_file

from trace_async.config import PredictorConfig
from trace_async.method.knapsack import FloatArray
from trace_async.method.posterior import Estimates, SuccessEstimator
from trace_async.predictor.features import NUM_FEATURES, history_features
from trace_async.predictor.head import StateHead
from trace_async.predictor.metrics import root_outcomes
from trace_async.predictor.questions import portions, prefix_keys
from trace_async.predictor.states import PolicyTrunk
from trace_async.predictor.targets import backed_up_targets, learnable
from trace_async.trees.tree import ROOT, RolloutTree
from trace_async.types import HiddenState, PrefixQuery
from trace_async.weights import WeightBucket, WeightManifest, WeightUpdate, pack_weights, unpack_weights

# Below so many rows a head would only repeat them.
MIN_ROWS = 32
_HEADS = ("prompt", "prefix")
_HEAD_PARTS = ("mean", "scale", "weights")
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

    def where(self, chosen: np.ndarray) -> "Rows":
        """The rows for which `chosen` [rows] is true."""
        return Rows(*(getattr(self, name)[chosen] for name in _ROW_FIELDS))


class PolicyTrunkPredictor:
    """Trunk, heads, window of rows and per-prompt counts. Not thread-safe; one owner calls it."""

    def __init__(self, config: PredictorConfig, policy_path: str | Path, *, device: str = "cpu") -> None:
        self.config = config
        self.trunk = PolicyTrunk(
            policy_path, num_layers=config.num_layers, num_last=config.pooled_tokens, device=device
        )
        width = self.trunk.width + NUM_FEATURES
        self.heads = {name: StateHead.untrained(width) for name in _HEADS}
        self.rows = Rows.none(width)
        self.asked: dict[bytes, tuple[int, np.ndarray]] = {}
        self.estimator = SuccessEstimator(
            config.prior_strength, fit=config.fit_prior_strength, half_life=config.count_half_life
        )
        self.version = 0
        self.num_updates = 0
        self.num_skipped = 0
        self.num_asked = self.num_given = self.num_older = 0
        self.busy_s = 0.0

    # ── values ───────────────────────────────────────────────────────────────────────────────────────────────────

    def predict(self, queries: Sequence[PrefixQuery]) -> list[FloatArray]:
        """V at each position of each query: arrays [len(query.positions)]. States are kept for the trees to come."""
        assert not self.lacks_weights, "a value of old weights must not pass for one of the new"
        started = time.monotonic()
        found: list[FloatArray] = []
        for some in portions(queries, [_num_unread(query) for query in queries], self.config.max_tokens_per_forward):
            keys = [key for query in some for key in prefix_keys(query)]
            versions, states = self._states(some, keys)
            self.asked.update(zip(keys, zip(versions, states, strict=True), strict=True))
            is_prompt = np.array([not query.turn_logprobs for query in some for _ in query.positions])
            ends = np.cumsum([len(query.positions) for query in some])
            found.extend(np.split(self._values(states, is_prompt), ends[:-1]))
        self.busy_s += time.monotonic() - started
        return found

    @property
    def lacks_weights(self) -> bool:
        """After a checkpoint was loaded, until the policy's weights of its version have come."""
        return self.trunk.version < self.version

    def _states(self, queries: Sequence[PrefixQuery], keys: Sequence[bytes]) -> tuple[list[int], np.ndarray]:
        """Of every asked prefix the version under which its state was read, and state with features [prefixes, width].

        What the engine gave with its turns is taken; the rest is read by the trunk, in one forward for all.
        """
        unread = [query for query in queries if not query.states]
        read = iter(self.trunk.read(unread) if unread else ())
        given = [query.states or [None] * len(query.positions) for query in queries]
        states = _fullest(keys, [state for some in given for state in some])
        versions = [state.policy_version if state else self.trunk.version for state in states]
        hidden = [np.frombuffer(state.values, dtype=np.float32) if state else next(read) for state in states]
        features = np.array([row for query in queries for row in _features(query)], dtype=np.float32)
        self.num_given += len(states) - states.count(None)
        self.num_older += sum(version < self.trunk.version for version in versions)
        self.num_asked += len(states)
        return versions, np.concatenate([np.stack(hidden), features], axis=1)

    def _values(self, states: np.ndarray, is_prompt: np.ndarray) -> FloatArray:
        values = {name: head.values(states) for name, head in self.heads.items()}
        return np.where(is_prompt, values["prompt"], values["prefix"])

    def estimate(self, task_ids: Sequence[str], queries: Sequence[PrefixQuery]) -> Estimates:
        """Beta posteriors of prompts: V of each as the prior, the prompt's own counts as evidence."""
        return self.posteriors(task_ids, np.array([value[-1] for value in self.predict(queries)]))

    def posteriors(self, task_ids: Sequence[str], values: FloatArray) -> Estimates:
        """The same with values [prompts] that are known already."""
        return self.estimator.estimate(task_ids, values, self.trunk.version)

    # ── learning ─────────────────────────────────────────────────────────────────────────────────────────────────

    def observe(self, trees: Sequence[RolloutTree], policy_version: int) -> dict[str, float]:
        """Take in the finished trees of one update; returns how well the values did that were there before.

        Prompts are judged by what the head says of them now, turns by what Stage 2 was told (`Node.value`).
        """
        started = time.monotonic()
        self.num_skipped += len([tree for tree in trees if tree.rollouts]) - len(learnable(trees))
        trees = learnable(trees)
        self.version = policy_version
        nodes = [_taught_nodes(tree, prefixes=self._learns) for tree in trees]
        for tree, own in zip(trees, nodes, strict=True):
            self._keep_states(tree, own)
        num_read = self._read_unasked(trees, nodes)
        metrics: dict[str, float] = {}
        if trees:
            new = self._rows(trees, nodes)
            prompts = np.cumsum([0, *(len(own) for own in nodes[:-1])])  # of each tree's nodes the prompt comes first
            values = self.heads["prompt"].values(new.states[prompts])
            self.estimator.observe(trees, values, policy_version)
            rows = self.rows.and_more(new)
            self.rows = rows.where(rows.versions > policy_version - self.config.window_versions)
            metrics = root_outcomes(trees, [_judged(t, v) for t, v in zip(trees, values, strict=True)]).metrics()
        oldest = policy_version - self.config.window_versions
        self.asked = {key: kept for key, kept in self.asked.items() if kept[0] >= oldest}
        self.busy_s += time.monotonic() - started
        return metrics | {"rows_read_again": float(num_read)} | self._totals()

    def _totals(self) -> dict[str, float]:
        """What is reported beside the quality of the values; counts of answers begin anew."""
        asked = max(1, self.num_asked)
        found = {
            "rows": float(len(self.rows.targets)),
            "states_from_engine": self.num_given / asked,
            "states_of_older_weights": self.num_older / asked,
            "sync_bytes": float(self.trunk.synced_bytes),
            "sync_s": self.trunk.sync_s,
            "prior_strength": self.estimator.strength,
            "skipped": float(self.num_skipped),
        }
        self.num_asked = self.num_given = self.num_older = 0
        self.trunk.synced_bytes, self.trunk.sync_s = 0, 0.0
        return found

    def _keep_states(self, tree: RolloutTree, nodes: Mapping[int, bytes]) -> None:
        """Those that the tree brings of turns that nobody asked for: of continuations."""
        for node in nodes.keys() & tree.states.keys():
            if node != ROOT and nodes[node] not in self.asked:
                state = tree.states[node]
                turns, length = tree.path(node)[1:], len(tree.prefix_tokens(node))
                features = history_features([tree.nodes[above].logprobs for above in turns], length)
                hidden = np.frombuffer(state.values, dtype=np.float32)
                row = np.concatenate([hidden, np.array(features, dtype=np.float32)])
                self.asked[nodes[node]] = state.policy_version, row

    def _read_unasked(self, trees: Sequence[RolloutTree], nodes: Sequence[dict[int, bytes]]) -> int:
        """Read the states of taught nodes that nobody asked this process for; returns how many."""
        queries = []
        for tree, own in zip(trees, nodes, strict=True):
            for node in (node for node, key in own.items() if key not in self.asked):
                tokens = tree.prefix_tokens(node)
                logprobs = tuple(tree.nodes[above].logprobs for above in tree.token_path(node) if above != ROOT)
                queries.append(PrefixQuery(token_ids=tokens, positions=(len(tokens),), turn_logprobs=logprobs))
        self.predict(queries)
        return len(queries)

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
        for name in _HEADS:
            rows = self.rows.where(self.rows.is_prompt == (name == "prompt"))
            if len(rows.targets) < MIN_ROWS:
                continue
            head = self.heads[name].refitted(rows.states, rows.targets, rows.weights, l2=self.config.head_l2)
            if head is None:
                self.num_skipped += 1
                continue
            self.heads[name] = head
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
        tensors: dict[str, torch.Tensor] = {}
        for name, head in self.heads.items():
            tensors |= {f"{name}/{part}": torch.from_numpy(getattr(head, part)) for part in _HEAD_PARTS}
            tensors[f"{name}/bias"] = torch.tensor([head.bias], dtype=torch.float64)
        return pack_weights(tensors, self.num_updates)

    def take_learnt(self, update: WeightUpdate) -> None:
        """Answer with what another one has learnt; ValueError when it is not what was sent."""
        arrays = {name: tensor.numpy() for name, tensor in unpack_weights(update).items()}
        self.heads = {name: _head(arrays, name, float(arrays[f"{name}/bias"][0])) for name in _HEADS}
        self.num_updates = update.manifest.policy_version
        self.asked.clear()  # who only answers keeps no rows

    # ── checkpoint ───────────────────────────────────────────────────────────────────────────────────────────────

    def save(self, directory: str | Path) -> None:
        """Heads, window, counts, into `directory` (made); the trunk is the policy's, which the learner saves."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        arrays = {f"{name}/{part}": getattr(head, part) for name, head in self.heads.items() for part in _HEAD_PARTS}
        arrays |= {f"rows/{name}": getattr(self.rows, name) for name in _ROW_FIELDS}
        save_file(
            {name: np.ascontiguousarray(array) for name, array in arrays.items()}, directory / "heads.safetensors"
        )
        state = {
            "version": self.version,
            "num_updates": self.num_updates,
            "biases": {name: head.bias for name, head in self.heads.items()},
            "estimator": self.estimator.state(),
        }
        (directory / "state.json").write_text(json.dumps(state), encoding="utf-8")

    def load(self, directory: str | Path) -> None:
        """Go on from a `save`; answers wait for the policy's weights. ValueError or OSError names what is broken."""
        directory = Path(directory)
        arrays = load_file(directory / "heads.safetensors")
        state = json.loads((directory / "state.json").read_text(encoding="utf-8"))
        self.heads = {name: _head(arrays, name, bias) for name, bias in state["biases"].items()}
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


def _fullest(keys: Sequence[bytes], states: Sequence[HiddenState | None]) -> list[HiddenState | None]:
    """Of equal histories (equal keys) the state that was read from the most tokens.

    Rollouts of a prompt often begin alike; the engine then computes what they share for one of them only, and for the
    others nothing but the last token.
    """
    best: dict[bytes, HiddenState] = {}
    for key, state in zip(keys, states, strict=True):
        if state is not None and (key not in best or state.num_tokens > best[key].num_tokens):
            best[key] = state
    return [best[key] if state is not None else None for key, state in zip(keys, states, strict=True)]


def _num_unread(query: PrefixQuery) -> int:
    return 0 if query.states else len(query.token_ids)


def _features(query: PrefixQuery) -> list[list[float]]:
    """Of each asked prefix of the query."""
    before = len(query.turn_logprobs) - len(query.positions)
    depths = [max(0, before + number) for number in range(1, len(query.positions) + 1)]
    return [
        history_features(query.turn_logprobs[:depth], position)
        for depth, position in zip(depths, query.positions, strict=True)
    ]


def _head(arrays: Mapping[str, np.ndarray], name: str, bias: float) -> StateHead:
    return StateHead(arrays[f"{name}/mean"], arrays[f"{name}/scale"], arrays[f"{name}/weights"], bias)


def _judged(tree: RolloutTree, prompt_value: float) -> FloatArray:
    return np.array([prompt_value, *(np.nan if node.value is None else node.value for node in tree.nodes[1:])])
