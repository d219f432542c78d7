"""The value model: V(H), the probability that a rollout continued from history H ends with reward 1.

A small model of the policy's family with its own weights and a scalar head, trained online on values backed up over
finished trees. It steers the allocation only and never enters the policy's gradient. One causal forward gives the
value at the end of every turn: of a rollout (`predict`), or of whole trees with shared prefixes once (`tree_values`).
"""

import json
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from trace_async.config import PredictorConfig
from trace_async.estimates import Estimates, SuccessEstimator
from trace_async.marginals import FloatArray
from trace_async.packing import Layout, concatenate, pack_values
from trace_async.policy import load_model
from trace_async.tree import RolloutTree
from trace_async.tree_attention import attention_for, hidden_states, prepare_model
from trace_async.tree_io import read_trees, write_trees
from trace_async.types import PrefixQuery
from trace_async.value_metrics import root_outcomes

# Values stay this far from 0 and 1, so that a posterior is never certain.
MARGIN = 1e-3


def backed_up_targets(tree: RolloutTree) -> tuple[FloatArray, FloatArray]:
    """Targets V^ and weights n_y, both [nodes]: V^(leaf) = r, V^(y) = Σ_c n_c·V^(c) / n_y (TRACE, METHOD section 2).

    That is the mean reward of the leaves below y; n_y counts them. A node without leaves (all its rollouts broke down)
    has weight 0.
    """
    weights = np.array(tree.num_leaves, dtype=float)
    totals = np.zeros(len(tree.nodes))
    for leaf, reward in tree.leaf_rewards.items():
        totals[leaf] = reward
    for index in range(len(tree.nodes) - 1, 0, -1):
        totals[tree.nodes[index].parent] += totals[index]
    return totals / np.maximum(weights, 1), weights


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
        return self.head(hidden.index_select(0, rows))[:, 0]


class ValuePredictor:
    """Value model, optimizer, replay window and per-prompt counts. Not thread-safe; one owner calls it."""

    def __init__(self, config: PredictorConfig, policy_path: str | Path, *, seed: int, device: str = "cpu") -> None:
        self.config = config
        self.device = device
        self.model = ValueModel(config.path or policy_path, num_layers=config.num_layers, device=device)
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
        self.busy_s = 0.0

    # ── values ───────────────────────────────────────────────────────────────────────────────────────────────────

    @torch.no_grad()
    def predict(self, queries: Sequence[PrefixQuery]) -> list[FloatArray]:
        """V at each position of each query, one causal forward for all: arrays [len(query.positions)]."""
        if not queries:
            return []
        started = time.monotonic()
        layout = concatenate([_lay_out_query(query) for query in queries])
        starts = np.cumsum([0, *(len(query.token_ids) for query in queries)])
        rows = [start + np.array(query.positions) - 1 for start, query in zip(starts, queries, strict=False)]
        values = self._values(layout, np.concatenate(rows))
        self.busy_s += time.monotonic() - started
        return np.split(values, np.cumsum([len(some) for some in rows])[:-1])

    @torch.no_grad()
    def tree_values(self, trees: Sequence[RolloutTree]) -> list[FloatArray]:
        """V at every node: arrays [nodes]."""
        if not trees:
            return []
        layout, ends = pack_values(trees)
        return np.split(self._values(layout, np.concatenate(ends)), np.cumsum([len(end) for end in ends])[:-1])

    def _values(self, layout: Layout, rows: np.ndarray) -> FloatArray:
        self.model.eval()
        logits = self.model(layout, torch.from_numpy(rows).to(self.device))
        return np.clip(torch.sigmoid(logits).cpu().numpy().astype(np.float64), MARGIN, 1 - MARGIN)

    def estimate(self, task_ids: Sequence[str], queries: Sequence[PrefixQuery]) -> Estimates:
        """Beta posteriors of prompts: the model's value of each as the prior, the prompt's own counts as evidence."""
        values = np.array([value[-1] for value in self.predict(queries)])
        return self.estimator.estimate(task_ids, values, self.version)

    # ── learning ─────────────────────────────────────────────────────────────────────────────────────────────────

    def observe(self, trees: Sequence[RolloutTree], policy_version: int) -> dict[str, float]:
        """Take in finished trees; returns how well the values of the model before learning from them did."""
        started = time.monotonic()
        trees = [tree for tree in trees if tree.rollouts]
        self.version = policy_version
        values = self.tree_values(trees)
        self.estimator.observe(trees, np.array([value[0] for value in values]), policy_version)
        self.replay.extend(trees)
        metrics = root_outcomes(trees, values).metrics()
        self.busy_s += time.monotonic() - started
        return {**metrics, "prior_strength": self.estimator.strength}

    def train_step(self, trees: Sequence[RolloutTree]) -> float:
        """One optimizer step on all nodes of `trees`; returns the loss, each node weighted by its leaves n_y.

        `loss` mse: the paper's squared error. bce: the cross-entropy, whose gradient does not fade where the model is
        confidently wrong.
        """
        started = time.monotonic()
        self.model.train()
        layout, ends = pack_values(trees)
        pairs = [backed_up_targets(tree) for tree in trees]
        targets, weights = (
            torch.from_numpy(np.concatenate(column)).float().to(self.device) for column in zip(*pairs, strict=True)
        )
        logits = self.model(layout, torch.from_numpy(np.concatenate(ends)).to(self.device))
        if self.config.loss == "bce":
            errors = nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        else:
            errors = (torch.sigmoid(logits) - targets) ** 2
        loss = (errors * weights).sum() / weights.sum().clamp(min=1)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.busy_s += time.monotonic() - started
        return float(loss.detach())

    def draw(self, new: Sequence[RolloutTree]) -> list[list[RolloutTree]]:
        """The trees of each of an update's steps: the new ones come first, the rest is drawn from the replay window."""
        new = [tree for tree in new if tree.rollouts]
        size = self.config.trees_per_step
        drawn: list[list[RolloutTree]] = []
        for step in range(self.config.steps_per_update if self.replay else 0):
            batch = list(new[step * size : (step + 1) * size])
            spare = min(size - len(batch), len(self.replay))
            batch += [self.replay[i] for i in self.rng.choice(len(self.replay), size=spare, replace=False)]
            drawn.append(batch)
        return drawn

    def train(self, trees: Sequence[RolloutTree], policy_version: int) -> dict[str, float]:
        """Take in the trees of one update and learn from them; see `observe`."""
        metrics = self.observe(trees, policy_version)
        losses = [self.train_step(batch) for batch in self.draw(trees)]
        return metrics | ({"loss": float(np.mean(losses))} if losses else {})

    # ── checkpoint ───────────────────────────────────────────────────────────────────────────────────────────────

    def save(self, directory: str | Path) -> None:
        """Weights, optimizer, replay window, counts and RNG, into `directory` (made)."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        weights = {name: tensor.contiguous() for name, tensor in self.model.state_dict().items()}
        save_file(weights, directory / "model.safetensors")
        torch.save(self.optimizer.state_dict(), directory / "optimizer.pt")
        write_trees(directory / "replay.jsonl", self.replay)
        state = {"version": self.version, "rng": self.rng.bit_generator.state, "estimator": self.estimator.state()}
        (directory / "state.json").write_text(json.dumps(state), encoding="utf-8")

    def load(self, directory: str | Path) -> None:
        """Go on from a `save`; never unpickles. Raises ValueError or OSError naming what is missing or broken."""
        directory = Path(directory)
        self.model.load_state_dict(load_file(directory / "model.safetensors"))
        self.optimizer.load_state_dict(torch.load(directory / "optimizer.pt", weights_only=True))
        self.replay = deque(read_trees(directory / "replay.jsonl"), maxlen=self.config.replay_trees)
        state = json.loads((directory / "state.json").read_text(encoding="utf-8"))
        self.version = state["version"]
        self.rng.bit_generator.state = state["rng"]
        self.estimator.load_state(state["estimator"])


def _lay_out_query(query: PrefixQuery) -> Layout:
    n = len(query.token_ids)
    return Layout(
        token_ids=np.array(query.token_ids, dtype=np.int64),
        positions=np.arange(n, dtype=np.int64),
        subtree_end=np.full(n, n, dtype=np.int64),
    )
