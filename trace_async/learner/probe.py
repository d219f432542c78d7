"""Compare one small branched row with the model's own forward pass when the learner starts.

There are hundreds of architectures, and no list says which of them respect the attention and the positions of a packed
row. So it is measured, with the very weights that are going to be trained:

    a a a a ─┬─ b b b ─┬─ c c c          packed row: each token once
             │         └─ d d            own forward: a b c, a b d, a e, one after another
             └─ e e e e
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from trace_async.config import Config, ConfigError
from trace_async.packing.layout import Entries, Layout, PackedBatch, concatenate

# The largest difference of log-probabilities that passes. Rounding in fp32 is below 1e-4. In bfloat16 it is so large
# that only coarse faults stand out.
TOLERANCE = {"float32": 5e-3, "bfloat16": 0.5}
# The three branches of the row above as (start, end) of their rows, and the Layout of the row.
_PATHS = (((0, 4), (4, 7), (7, 10)), ((0, 4), (4, 7), (10, 12)), ((0, 4), (12, 16)))
_POSITIONS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 7, 8, 4, 5, 6, 7)
_ENDS = (16, 16, 16, 16, 12, 12, 12, 10, 10, 10, 12, 12, 16, 16, 16, 16)

Logprobs = Callable[[PackedBatch], torch.Tensor]
Logits = Callable[[torch.Tensor], torch.Tensor]


def check_packed_rows(config: Config, vocab_size: int, packed: Logprobs, own: Logits, *, flat: bool) -> None:
    """Raise ConfigError when `packed` and the model's own logits disagree.

    `packed` gives the log-probabilities [E] of a batch's entries, as in training. `own` gives the logits [T, vocab] of
    one row [1, T] by the model alone. Every rank must call this, because both may compute with partitioned weights.
    """
    ids = np.random.default_rng(0).integers(0, vocab_size, size=len(_ENDS))
    batch = _flat_row(ids) if flat else _tree_row(ids)
    try:
        with torch.no_grad():
            found = packed(batch).float().cpu()
            rows = [_logprobs(own(torch.tensor(ids[_rows(path)])[None]), ids[_rows(path)], config) for path in _PATHS]
    except Exception as error:  # the code is that of any model there is, so any error is possible
        raise ConfigError(_message(config, f"cannot compute a packed row ({type(error).__name__}: {error})")) from error
    # In the tree, a token that two branches share is predicted once, so only what a branch adds is expected of it.
    expected = torch.cat(rows if flat else [rows[0], rows[1][6:], rows[2][3:]])
    gap = float((found - expected).abs().max())
    if not gap <= TOLERANCE[config.learner.dtype]:
        raise ConfigError(
            _message(
                config, f"gives other log-probabilities to a packed row than by its own forward pass (by {gap:.2g})"
            )
        )


def _message(config: Config, problem: str) -> str:
    remedy = "set learner.packing=flat, or use" if config.learner.packing == "tree" else "use"
    return f"policy.path={config.policy.path}: this model {problem}; {remedy} a family of docs/models.md"


def _rows(path: tuple[tuple[int, int], ...]) -> np.ndarray:
    return np.concatenate([np.arange(start, end) for start, end in path])


def _tree_row(ids: np.ndarray) -> PackedBatch:
    layout = Layout(token_ids=ids, positions=np.array(_POSITIONS), subtree_end=np.array(_ENDS))
    predicted: dict[tuple[int, int], None] = {}
    for path in _PATHS:
        rows = _rows(path)
        predicted |= dict.fromkeys(zip(rows[:-1].tolist(), rows[1:].tolist(), strict=True))
    return _batch(layout, list(predicted))


def _flat_row(ids: np.ndarray) -> PackedBatch:
    lengths = [len(_rows(path)) for path in _PATHS]
    layouts = [
        Layout(token_ids=ids[_rows(path)], positions=np.arange(length), subtree_end=np.full(length, length))
        for path, length in zip(_PATHS, lengths, strict=True)
    ]
    starts = np.cumsum([0, *lengths])
    pairs = [
        (start + i, start + i + 1) for start, length in zip(starts, lengths, strict=False) for i in range(length - 1)
    ]
    return _batch(concatenate(layouts), pairs)


def _batch(layout: Layout, pairs: list[tuple[int, int]]) -> PackedBatch:
    rows, targets = (torch.tensor(column) for column in zip(*pairs, strict=True))
    zeros = torch.zeros(len(pairs))
    entries = Entries(
        rows=rows,
        labels=torch.from_numpy(layout.token_ids)[targets],
        generator_logprobs=zeros,
        positive=zeros,
        negative=zeros,
        weight=zeros,
        policy_versions=torch.zeros(len(pairs), dtype=torch.int64),
    )
    return PackedBatch(layout=layout, entries=entries, has_credit=False)


def _logprobs(logits: Any, ids: np.ndarray, config: Config) -> torch.Tensor:
    scaled = logits.float().cpu() / config.sampling.temperature
    return scaled.log_softmax(-1)[:-1].gather(1, torch.from_numpy(ids)[1:, None])[:, 0]
