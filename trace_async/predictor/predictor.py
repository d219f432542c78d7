"""The value model: V(H), the probability that a rollout continued from history H ends with reward 1.

A small model of the policy's family with its own weights and a scalar head, trained online on values backed up over
finished trees. It steers the allocation only and never enters the policy's gradient. One causal forward gives the
value at the end of every turn: of a rollout (`predict`), or of whole trees with shared prefixes once (`tree_values`).
"""

import json
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from trace_async.config import PredictorConfig
from trace_async.method.knapsack import FloatArray
from trace_async.method.posterior import Estimates, SuccessEstimator
from trace_async.packing.attention import attention_for, hidden_states, prepare_model
from trace_async.packing.layout import Layout, concatenate, lay_out_tree, round_rows
from trace_async.policy.load import load_model
from trace_async.predictor.metrics import root_outcomes
from trace_async.predictor.questions import portions
from trace_async.predictor.targets import backed_up_targets, learnable
from trace_async.trees.io import read_trees, write_trees
from trace_async.trees.tree import ROOT, RolloutTree
from trace_async.types import PrefixQuery
from trace_async.weights import WeightUpdate, pack_weights, unpack_weights

# Values stay this far from 0 and 1, so that a posterior is never certain.
MARGIN = 1e-3


class ValueModel(nn.Module):
    """The first `num_layers` (0: all) layers of a Hugging Face causal LM, its final norm, and a linear head → logit."""

    def __init__(self, path: str | Path, *, num_layers: int, device: str) -> None:
        super().__init__()
        self.trunk = load_model(path, device=device).base_model
        if num_layers:
            self.trunk.layers = self.trunk.layers[:num_layers]
            self.trunk.config.num_hidden_layers = len(self.trunk.layers)
        self.head = nn.Linear(self.trunk.config.hidden_size, 1, device=device)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.kind = attention_for(torch.device(device), flat=False)
        prepare_model(self.trunk, self.kind)

    def forward(self, layout: Layout, rows: torch.Tensor) -> torch.Tensor:
        """Logits [len(rows)] of V after the tokens at `rows` of a packed row."""
        hidden = hidden_states(self.trunk, layout, self.kind)
        filler = round_rows(len(rows)) - len(rows)
        return self.head(hidden.index_select(0, nn.functional.pad(rows, (0, filler))))[: len(rows), 0]


@dataclass(frozen=True, slots=True)
class _Batch:
    """A packed row; the rows where values are learnt, with their targets and weights, arrays of one length."""

    layout: Layout
    rows: np.ndarray
    targets: FloatArray
    weights: FloatArray


class ValuePredictor:
    """Value model, optimizer, replay window and per-prompt counts. Not thread-safe; one owner calls it."""

    def __init__(self, config: PredictorConfig, policy_path: str | Path, *, seed: int, device: str = "cpu") -> None:
        self.config = config
        self.device = device
        num_layers = 0 if config.path else config.num_layers
        self.model = ValueModel(config.path or policy_path, num_layers=num_layers, device=device)
        self.optimizer = torch.optim.AdamW(
            [
                {"params": self.model.trunk.parameters(), "lr": config.learning_rate},
                {"params": self.model.head.parameters(), "lr": config.learning_rate * config.head_lr_scale},
            ],
            betas=(0.9, 0.95),
            weight_decay=config.weight_decay,
        )
        self.replay: deque[RolloutTree] = deque(maxlen=config.replay_trees)
        self.rng = np.random.default_rng(seed)
        self.estimator = SuccessEstimator(
            config.prior_strength, fit=config.fit_prior_strength, half_life=config.count_half_life
        )
        self.version = 0
        self.num_updates = 0
        self.num_skipped = 0
        self.busy_s = 0.0

    # ── values ───────────────────────────────────────────────────────────────────────────────────────────────────

    @torch.no_grad()
    def predict(self, queries: Sequence[PrefixQuery]) -> list[FloatArray]:
        """V at each position of each query, one causal forward for all: arrays [len(query.positions)]."""
        started = time.monotonic()
        found: list[FloatArray] = []
        for some in portions(queries, [len(query.token_ids) for query in queries], self.config.max_tokens_per_forward):
            starts = np.cumsum([0, *(len(query.token_ids) for query in some)])
            rows = [start + np.array(query.positions) - 1 for start, query in zip(starts, some, strict=False)]
            values = self._values(concatenate([_lay_out_query(query) for query in some]), np.concatenate(rows))
            found.extend(np.split(values, np.cumsum([len(own) for own in rows])[:-1]))
        self.busy_s += time.monotonic() - started
        return found

    @torch.no_grad()
    def tree_values(self, trees: Sequence[RolloutTree]) -> list[FloatArray]:
        """V at every node that something follows: arrays [nodes], nan at leaves. One forward for all."""
        values = [np.full(len(tree.nodes), np.nan) for tree in trees]
        place = iter(values)
        for some in portions(trees, [tree.num_unique_tokens for tree in trees], self.config.max_tokens_per_forward):
            layout, rows, inner = _lay_out_inner(some)
            found = np.split(self._values(layout, rows), np.cumsum([len(nodes) for nodes in inner])[:-1])
            for nodes, own in zip(inner, found, strict=True):
                next(place)[nodes] = own
        return values

    def _values(self, layout: Layout, rows: np.ndarray) -> FloatArray:
        self.model.eval()
        logits = self.model(layout, torch.from_numpy(rows).to(self.device))
        return np.clip(torch.sigmoid(logits).cpu().numpy().astype(np.float64), MARGIN, 1 - MARGIN)

    def estimate(self, task_ids: Sequence[str], queries: Sequence[PrefixQuery]) -> Estimates:
        """Beta posteriors of prompts: the model's value of each as the prior, the prompt's own counts as evidence."""
        return self.posteriors(task_ids, np.array([value[-1] for value in self.predict(queries)]))

    def posteriors(self, task_ids: Sequence[str], values: FloatArray) -> Estimates:
        """The same with values [prompts] that are known already."""
        return self.estimator.estimate(task_ids, values, self.version)

    # ── learning ─────────────────────────────────────────────────────────────────────────────────────────────────

    def observe(self, trees: Sequence[RolloutTree], policy_version: int) -> dict[str, float]:
        """Take in finished trees; returns how well the values did that were there before learning from them.

        For the prompts the model is asked again; for turns, what it said when Stage 2 asked (`Node.value`).
        """
        self.num_skipped += sum(bool(tree.rollouts) for tree in trees) - len(learnable(trees))
        trees = learnable(trees)
        self.version = policy_version
        prompts = [tree.nodes[ROOT].token_ids for tree in trees]
        found = self.predict([PrefixQuery(token_ids=tokens, positions=(len(tokens),)) for tokens in prompts])
        prompt_values = np.array([value[0] for value in found])
        self.estimator.observe(trees, prompt_values, policy_version)
        self.replay.extend(trees)
        values = [
            np.array([value, *(np.nan if node.value is None else node.value for node in tree.nodes[1:])])
            for value, tree in zip(prompt_values, trees, strict=True)
        ]
        metrics = root_outcomes(trees, values).metrics()
        return {**metrics, "prior_strength": self.estimator.strength, "skipped": float(self.num_skipped)}

    def train_step(self, trees: Sequence[RolloutTree]) -> float:
        """One optimizer step on all histories of `trees` that something follows, each weighted by its leaves n_y."""
        batches = []
        for some in portions(trees, [tree.num_unique_tokens for tree in trees], self.config.max_tokens_per_forward):
            layout, rows, inner = _lay_out_inner(some)
            pairs = [backed_up_targets(tree) for tree in some]
            targets = [values[nodes] for (values, _), nodes in zip(pairs, inner, strict=True)]
            weights = [counts[nodes] for (_, counts), nodes in zip(pairs, inner, strict=True)]
            batches.append(_Batch(layout, rows, np.concatenate(targets), np.concatenate(weights)))
        return self._step(batches)

    def train_prompt_step(self, trees: Sequence[RolloutTree]) -> float:
        """One optimizer step on the prompts of `trees` alone, on the mean reward of their root rollouts.

        Prompts are short, so Stage 1's question is learnt at a fraction of the cost of whole trees; and root rollouts
        alone are free of the bias that choosing continuations by outcome leaves in a prompt's backed-up value.
        """
        batches = []
        for some in portions(
            trees, [len(tree.nodes[ROOT].token_ids) for tree in trees], self.config.max_tokens_per_forward
        ):
            layouts = [lay_out_tree(tree, {ROOT: len(tree.nodes[ROOT].token_ids)})[0] for tree in some]
            rows = np.cumsum([layout.num_tokens for layout in layouts]) - 1
            rewards = [[rollout.reward for rollout in tree.rollouts if rollout.kind == "root"] for tree in some]
            targets, weights = np.array([np.mean(r) for r in rewards]), np.array([float(len(r)) for r in rewards])
            batches.append(_Batch(concatenate(layouts), rows, targets, weights))
        return self._step(batches)

    def _step(self, batches: Sequence[_Batch]) -> float:
        """One optimizer step, gradients summed over `batches`; returns the weighted mean loss.

        A loss or gradient that is not finite changes nothing and is counted in `num_skipped`.

        `loss` mse: the paper's squared error. bce: the cross-entropy, whose gradient does not fade where the model is
        confidently wrong.
        """
        started = time.monotonic()
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        total_weight = sum(float(batch.weights.sum()) for batch in batches)
        total = 0.0
        for batch in batches:
            logits = self.model(batch.layout, torch.from_numpy(batch.rows).to(self.device))
            target, weight = (torch.from_numpy(a).float().to(self.device) for a in (batch.targets, batch.weights))
            if self.config.loss == "bce":
                errors = nn.functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
            else:
                errors = (torch.sigmoid(logits) - target) ** 2
            loss = (errors * weight).sum() / total_weight
            loss.backward()
            total += float(loss.detach())
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        if math.isfinite(total) and torch.isfinite(norm):
            self.optimizer.step()
        else:
            self.num_skipped += 1
        self.busy_s += time.monotonic() - started
        return total

    def steps(self, new: Sequence[RolloutTree]) -> Iterator[Callable[[], float]]:
        """The optimizer steps of one update, each to be called once; it returns its loss.

        `steps_per_update` (0: it never learns) on whole trees: the new ones first, the rest drawn from the replay
        window. Then `prompt_steps_per_update` on prompts drawn from it, and `warmup_steps` more at the first update,
        half as many at each that follows; they come last because new trees hold only what Stage 1 picked.
        """
        new = learnable(new)
        if not self.replay or not self.config.steps_per_update:
            return
        size = self.config.trees_per_step
        for step in range(self.config.steps_per_update):
            batch = new[step * size : (step + 1) * size]
            yield partial(self.train_step, batch + self._draw(size - len(batch)))
        extra = self.config.warmup_steps >> self.num_updates
        self.num_updates += 1
        for _ in range(self.config.prompt_steps_per_update + extra):
            yield partial(self.train_prompt_step, self._draw_prompts())

    def _draw(self, size: int) -> list[RolloutTree]:
        chosen = self.rng.choice(len(self.replay), size=min(size, len(self.replay)), replace=False)
        return [self.replay[index] for index in chosen]

    def _draw_prompts(self) -> list[RolloutTree]:
        """As many trees of the replay window as have `prompt_tokens_per_step` tokens in their prompts; at least one."""
        shuffled = self._draw(len(self.replay))
        tokens = np.cumsum([len(tree.nodes[ROOT].token_ids) for tree in shuffled])
        return shuffled[: max(1, int((tokens <= self.config.prompt_tokens_per_step).sum()))]

    def train(self, trees: Sequence[RolloutTree], policy_version: int) -> dict[str, float]:
        """Take in the trees of one update and learn from them; see `observe`."""
        metrics = self.observe(trees, policy_version)
        losses = [step() for step in self.steps(trees)]
        return metrics | ({"loss": losses[-1]} if losses else {})

    def learnt(self) -> WeightUpdate:
        """What it has learnt, for replicas that only answer: its weights, numbered by its updates, with a checksum."""
        return pack_weights(self.model.state_dict(), self.num_updates)

    def take_learnt(self, update: WeightUpdate) -> None:
        """Answer with what another one has learnt; ValueError when it is not what was sent."""
        self.model.load_state_dict(unpack_weights(update))
        self.num_updates = update.manifest.policy_version

    # ── checkpoint ───────────────────────────────────────────────────────────────────────────────────────────────

    def save(self, directory: str | Path) -> None:
        """Weights, optimizer, replay window, counts and RNG, into `directory` (made)."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        weights = {name: tensor.contiguous() for name, tensor in self.model.state_dict().items()}
        save_file(weights, directory / "model.safetensors")
        torch.save(self.optimizer.state_dict(), directory / "optimizer.pt")
        write_trees(directory / "replay.jsonl", self.replay)
        state = {
            "version": self.version,
            "num_updates": self.num_updates,
            "rng": self.rng.bit_generator.state,
            "estimator": self.estimator.state(),
        }
        (directory / "state.json").write_text(json.dumps(state), encoding="utf-8")

    def load(self, directory: str | Path) -> None:
        """Go on from a `save`; never unpickles. Raises ValueError or OSError naming what is missing or broken."""
        directory = Path(directory)
        self.model.load_state_dict(load_file(directory / "model.safetensors"))
        self.optimizer.load_state_dict(torch.load(directory / "optimizer.pt", weights_only=True))
        self.replay = deque(read_trees(directory / "replay.jsonl"), maxlen=self.config.replay_trees)
        state = json.loads((directory / "state.json").read_text(encoding="utf-8"))
        self.version, self.num_updates = state["version"], state["num_updates"]
        self.rng.bit_generator.state = state["rng"]
        self.estimator.load_state(state["estimator"])


def _lay_out_inner(trees: Sequence[RolloutTree]) -> tuple[Layout, np.ndarray, list[list[int]]]:
    """All nodes that have children in one row; the rows where their histories end, tree by tree; and those nodes.

    Leaves are left out: nobody asks for the value of a finished rollout, and they are a good part of the tokens.
    """
    layouts, rows, inner, start = [], [], [], 0
    for tree in trees:
        nodes = [node for node, children in enumerate(tree.children) if children or node == ROOT]
        layout, first_row = lay_out_tree(tree, {node: len(tree.nodes[node].token_ids) for node in nodes})
        for node in nodes:
            while not tree.nodes[node].token_ids:
                node = tree.nodes[node].before
            rows.append(start + first_row[node] + len(tree.nodes[node].token_ids) - 1)
        layouts.append(layout)
        inner.append(nodes)
        start += layout.num_tokens
    return concatenate(layouts), np.array(rows), inner


def _lay_out_query(query: PrefixQuery) -> Layout:
    n = len(query.token_ids)
    return Layout(
        token_ids=np.array(query.token_ids, dtype=np.int64),
        positions=np.arange(n, dtype=np.int64),
        subtree_end=np.full(n, n, dtype=np.int64),
    )
