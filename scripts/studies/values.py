"""Compare ways to read V(H) from the policy's states, on the recorded trees of a run.

    trace-async train --config configs/quickstart/multihop.yaml checkpoint.every_updates=0
    python -m scripts.studies.values runs/quickstart --policy .cache/policies/…

Without checkpoints between its updates a run keeps the schedule of all of them, with every tree.

The learner is run again over the trees, update by update, which gives the weights of every version (its `mismatch_kl`
says whether they are those of the run). The prefixes of each tree are read under the weights at which the tree began.
Then every variant is fitted to the trees that were learnt from before a tree began, and judged on that tree: values are
as old as they are in a run. What the run itself used stands in the first line.
"""

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from trace_async.config import Config, load_config
from trace_async.learner.learner import Learner
from trace_async.packing.attention import hidden_states, prepare_model
from trace_async.policy.load import load_model
from trace_async.predictor.features import PROMPT_VALUE, history_features
from trace_async.predictor.head import MARGIN, StateHead
from trace_async.predictor.metrics import ValuedOutcomes
from trace_async.predictor.questions import lay_out_queries
from trace_async.predictor.targets import backed_up_targets, learnable
from trace_async.run.schedule import Schedule
from trace_async.trees.tree import ROOT, RolloutTree
from trace_async.types import PrefixQuery

POOLINGS = (1, 4, 10, 16)


@dataclass(frozen=True, slots=True)
class Row:
    """One history that something follows. `states[pooling]`: [layers, hidden]; `reward`: of the rollout that passed.

    `update`: that trained on its tree; `version`: of the weights under which the tree began; `told`: what the run said.
    """

    update: int
    version: int
    prompt: str
    depth: int
    is_root: bool
    target: float
    weight: float
    reward: float
    told: float
    states: dict[int, np.ndarray]
    features: list[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """What is read, what is fitted to it, and to what. `layers`: of prefixes; `prompt_layers`: of prompts."""

    layers: tuple[int, ...]
    prompt_layers: tuple[int, ...] = (1,)
    pooled: int = 10
    with_features: bool = True
    with_prompt_value: bool = True
    window: int = 32
    split: bool = True
    with_continuations: bool = True
    head: str = "logistic"
    l2: float = 10.0


class Reader:
    """A copy of the policy that gives the states after every layer."""

    def __init__(self, path: Path) -> None:
        self.model: Any = load_model(path)
        prepare_model(self.model.base_model, "grouped")
        self.seen: dict[int, torch.Tensor] = {}
        for number, layer in enumerate(self.model.base_model.layers):
            layer.register_forward_hook(lambda _m, _i, out, n=number: self._keep(n, out))

    def _keep(self, number: int, output: Any) -> None:
        self.seen[number] = output[0] if isinstance(output, tuple) else output

    @torch.no_grad()
    def rows(self, update: int, tree: RolloutTree) -> Iterator[Row]:
        nodes = [node for node, children in enumerate(tree.children) if children or node == ROOT]
        tokens = [tree.prefix_tokens(node) for node in nodes]
        asked = lay_out_queries([PrefixQuery(token_ids=t, positions=(len(t),)) for t in tokens], num_last=max(POOLINGS))
        hidden_states(self.model, asked.layout, "grouped")
        layers = torch.stack([self.seen[n].reshape(-1, self.seen[n].shape[-1]) for n in sorted(self.seen)])
        parts = np.split(layers[:, asked.rows].numpy(), asked.starts[1:], axis=1)
        targets, weights = backed_up_targets(tree)
        roots = [rollout.reward for rollout in tree.rollouts if rollout.kind == "root"]
        targets[ROOT], weights[ROOT] = np.mean(roots), len(roots)
        for node, part, ids in zip(nodes, parts, tokens, strict=True):
            record = tree.nodes[node]
            own = tree.rollouts[record.rollout] if node else None
            yield Row(
                update=update,
                version=tree.policy_version_started,
                prompt=f"{update}/{tree.task.id}",
                depth=tree.depths[node],
                is_root=own is None or own.kind == "root",
                target=targets[node],
                weight=weights[node],
                reward=own.reward if own else float(np.mean(roots)),
                told=np.nan if record.value is None else record.value,
                states={count: part[:, -count:].mean(axis=1) for count in POOLINGS},
                features=history_features(
                    [tree.nodes[n].logprobs for n in tree.path(node)[1:]],
                    len(ids),
                    tree.nodes[ROOT].value if node else None,
                ),
            )


def read_run(config: Config, run: Path, policy: Path) -> list[Row]:
    """Return all rows of the run; the learner is run over its trees for the weights."""
    schedule = Schedule(run)
    numbers = schedule.updates()
    if numbers[:1] != [1]:
        raise SystemExit(f"{run}/schedule does not begin with update 1: record a run with checkpoint.every_updates=0")
    learner, reader = Learner(config, policy), Reader(policy)
    updates = [learnable(schedule.read_trees(number)) for number in numbers]
    waiting: dict[int, list[tuple[int, RolloutTree]]] = defaultdict(list)
    for update, trees in enumerate(updates, start=1):
        for tree in trees:
            waiting[tree.policy_version_started].append((update, tree))
    rows: list[Row] = []
    version, mismatch = 0, 0.0
    for trees in [[], *updates]:
        if trees:
            metrics = learner.update(trees, version)
            version += int(metrics["updated"])
            mismatch = max(mismatch, metrics.get("mismatch_kl", 0.0))
        reader.model.load_state_dict(dict(learner.policy.named_parameters()), strict=False)
        for update, tree in waiting.pop(version, []):
            rows.extend(reader.rows(update, tree))
    assert not waiting, f"trees of versions {sorted(waiting)} began before the learner came there"
    print(
        f"{len(rows)} histories of {len(updates)} updates; mismatch_kl of the replayed learner at most {mismatch:.1e}"
    )
    return rows


# ── heads ────────────────────────────────────────────────────────────────────────────────────────────────────────────

Values = Callable[[np.ndarray], np.ndarray]


class Logistic:
    def __init__(self, width: int, l2: float) -> None:
        self.head, self.l2 = StateHead.untrained(width), l2

    def fit(self, states: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> Values:
        self.head = self.head.refitted(states, targets, weights, l2=self.l2) or self.head
        return self.head.values


class Ridge:
    def __init__(self, _width: int, l2: float) -> None:
        self.l2 = l2

    def fit(self, states: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> Values:
        mean, scale = states.mean(axis=0), states.std(axis=0) + 1e-3
        rows = np.c_[(states - mean) / scale, np.ones(len(states))]
        shares = weights / weights.sum()
        gram = rows.T @ (rows * shares[:, None]) + self.l2 * np.eye(rows.shape[1])
        theta = np.linalg.solve(gram, rows.T @ (shares * targets))
        return lambda new: np.clip(np.c_[(new - mean) / scale, np.ones(len(new))] @ theta, MARGIN, 1 - MARGIN)


class Mlp:
    """One hidden layer of 32, trained on from update to update."""

    def __init__(self, width: int, l2: float) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.BatchNorm1d(width, affine=False), nn.Linear(width, 32), nn.GELU(), nn.Linear(32, 1))
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=3e-3, weight_decay=l2)

    def fit(self, states: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> Values:
        columns = [torch.from_numpy(np.asarray(column, dtype=np.float32)) for column in (states, targets, weights)]
        self.net.train()
        for _ in range(60):
            drawn = torch.randint(len(states), (256,))
            rows, target, weight = (column[drawn] for column in columns)
            loss = nn.functional.binary_cross_entropy_with_logits(self.net(rows)[:, 0], target, weight)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        return self._values

    @torch.no_grad()
    def _values(self, states: np.ndarray) -> np.ndarray:
        self.net.eval()
        logits = self.net(torch.from_numpy(states.astype(np.float32)))[:, 0]
        return torch.sigmoid(logits).numpy().astype(np.float64).clip(MARGIN, 1 - MARGIN)


HEADS: dict[str, Callable[[int, float], Logistic | Ridge | Mlp]] = {"logistic": Logistic, "ridge": Ridge, "mlp": Mlp}


# ── comparison ───────────────────────────────────────────────────────────────────────────────────────────────────────


def judge(rows: Sequence[Row], variant: Variant) -> tuple[np.ndarray, float]:
    """Values [rows], each from the updates that were done when its tree began; and the processor seconds of fitting,
    per update."""
    states = np.array([_inputs(row, variant) for row in rows], dtype=np.float32)
    targets, weights = np.array([row.target for row in rows]), np.array([row.weight for row in rows])
    updates, versions = np.array([row.update for row in rows]), np.array([row.version for row in rows])
    depths = np.array([row.depth for row in rows])
    taught = np.array([row.is_root or variant.with_continuations for row in rows])
    values, seconds, last = np.full(len(rows), 0.5), 0.0, int(updates.max())
    groups = [depths == 0, depths > 0] if variant.split else [depths >= 0]
    for group in groups:
        head = HEADS[variant.head](states.shape[1], variant.l2)
        for version in range(1, last):
            fitted = group & taught & (updates <= version) & (versions > version - variant.window)
            if fitted.sum() < 32:
                continue
            started = time.process_time()
            predict = head.fit(states[fitted], targets[fitted], weights[fitted])
            seconds += time.process_time() - started
            now = group & (versions == version)
            values[now] = predict(states[now])
    return values, seconds / last


def _inputs(row: Row, variant: Variant) -> np.ndarray:
    layers = variant.layers if row.depth else variant.prompt_layers
    parts = [row.states[variant.pooled][layer - 1] for layer in layers]
    if variant.with_features:
        features = np.array(row.features)
        parts.append(features if variant.with_prompt_value else np.delete(features, PROMPT_VALUE))
    return np.concatenate(parts)


def report(name: str, rows: Sequence[Row], values: np.ndarray, seconds: float) -> None:
    """Of root rollouts: AUC of prefixes, within and between prompts, and the gain in Brier over the base by depth."""
    prompts = {prompt: number for number, prompt in enumerate(dict.fromkeys(row.prompt for row in rows))}
    chosen = [i for i, row in enumerate(rows) if row.is_root and not np.isnan(values[i]) and row.update > 1]
    columns = [(values[i], rows[i].reward, rows[i].depth, prompts[rows[i].prompt]) for i in chosen]
    found = ValuedOutcomes(*np.array(columns, dtype=float).T)
    updates, last = np.array([rows[i].update for i in chosen]), max(row.update for row in rows)
    line = f"{name:<34} {1e3 * seconds:4.0f} ms"
    for third in range(3):
        metrics = found.where((updates > third * last // 3) & (updates <= (third + 1) * last // 3)).metrics()
        auc = " ".join(f"{metrics.get(f'auc_{kind}', np.nan):.3f}" for kind in ("prefix", "within", "between"))
        depths = sorted(int(key.rpartition("_")[2]) for key in metrics if key.startswith("brier_base/"))
        gains = " ".join(f"{metrics[f'brier_base/depth_{d}'] - metrics[f'brier/depth_{d}']:+.3f}" for d in depths)
        line += f" | AUC {auc}, prompts {metrics.get('auc/depth_0', np.nan):.3f}, gain {gains}"
    print(line, flush=True)


def variants(num_layers: int) -> Iterator[tuple[str, Variant]]:
    chosen = Variant(layers=(num_layers,))
    yield "chosen", chosen
    # Of a deep policy seven layers or so, or the table would have a row for each of thirty.
    some = tuple(range(num_layers, 0, -max(1, num_layers // 6)))[::-1]
    for layer in some:
        yield f"layer {layer}", replace(chosen, layers=(layer,), prompt_layers=(layer,))
    yield f"{len(some)} layers together", replace(chosen, layers=some, prompt_layers=some)
    for pooled in POOLINGS:
        yield f"last {pooled} tokens", replace(chosen, pooled=pooled)
    yield "without features", replace(chosen, with_features=False)
    yield "features alone", replace(chosen, layers=(), prompt_layers=())
    yield "without the prompt's value", replace(chosen, with_prompt_value=False)
    yield "one head for prompts and prefixes", replace(chosen, prompt_layers=chosen.layers, split=False)
    yield "without turns of continuations", replace(chosen, with_continuations=False)
    for window in (8, 16):
        yield f"window of {window}", replace(chosen, window=window)
    for l2 in (1.0, 30.0, 100.0, 300.0, 1000.0):
        yield f"penalty {l2:g}", replace(chosen, l2=l2)
    yield "ridge", replace(chosen, head="ridge", l2=0.1)
    yield "mlp", replace(chosen, head="mlp", l2=0.03)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run's folder, recorded with checkpoint.every_updates=0")
    parser.add_argument("--policy", type=Path, required=True, help="the start policy of that run")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = read_run(load_config(args.run / "config.yaml"), args.run, args.policy)
    print("\nname, fitting per update | first third | second | last")
    report("as the run itself was told", rows, np.array([row.told for row in rows]), 0.0)
    num_layers = len(rows[0].states[1])
    for name, variant in variants(num_layers):
        report(name, rows, *judge(rows, variant))


if __name__ == "__main__":
    main()
