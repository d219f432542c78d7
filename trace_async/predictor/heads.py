"""The two heads of `predictor.trunk=policy`: one for prompts, one for prefixes.

What makes a question hard shows otherwise than what makes a rollout fail. Whoever has the heads and the states can say
V without asking anybody: that is what PromptActors do with the states that the engine gave them with their turns.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import torch

from trace_async.method.knapsack import FloatArray
from trace_async.predictor.features import NUM_FEATURES, history_features
from trace_async.predictor.head import StateHead
from trace_async.predictor.questions import prefix_keys
from trace_async.types import HiddenState, PrefixQuery
from trace_async.weights import WeightUpdate, pack_weights, unpack_weights

HeadName: TypeAlias = Literal["prompt", "prefix"]
_NAMES: tuple[HeadName, ...] = ("prompt", "prefix")
_PARTS = ("mean", "scale", "weights")


@dataclass(frozen=True, slots=True)
class Heads:
    """Both read rows of a state with the features of its history (`rows_of`)."""

    prompt: StateHead
    prefix: StateHead

    @classmethod
    def untrained(cls, state_width: int) -> "Heads":
        """For states of this width. They say one half of everything."""
        head = StateHead.untrained(state_width + NUM_FEATURES)
        return cls(prompt=head, prefix=head)

    def of(self, name: HeadName) -> StateHead:
        return self.prompt if name == "prompt" else self.prefix

    def with_head(self, name: HeadName, head: StateHead) -> "Heads":
        """These, with another head in the place of `name`."""
        return Heads(head, self.prefix) if name == "prompt" else Heads(self.prompt, head)

    def prefix_values(self, queries: Sequence[PrefixQuery]) -> list[FloatArray]:
        """V at each position of each query: arrays [len(query.positions)]. All bring the states of their prefixes."""
        if not queries:
            return []
        keys = [key for query in queries for key in prefix_keys(query)]
        states = fullest(keys, [state for query in queries for state in query.states])
        values = self.prefix.values(rows_of(queries, [vector(state) for state in states]))
        return np.split(values, np.cumsum([len(query.positions) for query in queries])[:-1])

    def tensors(self) -> dict[str, np.ndarray]:
        """Every number of both, by name."""
        found: dict[str, np.ndarray] = {}
        for name in _NAMES:
            head = self.of(name)
            found |= {f"{name}/{part}": getattr(head, part) for part in _PARTS}
            found[f"{name}/bias"] = np.array([head.bias])
        return found

    @classmethod
    def of_tensors(cls, tensors: dict[str, np.ndarray]) -> "Heads":
        """The opposite of `tensors`. KeyError names what is missing."""
        prompt, prefix = (
            StateHead(
                tensors[f"{name}/mean"],
                tensors[f"{name}/scale"],
                tensors[f"{name}/weights"],
                float(tensors[f"{name}/bias"][0]),
            )
            for name in _NAMES
        )
        return cls(prompt, prefix)

    def packed(self, number: int) -> WeightUpdate:
        """To be sent, with a checksum; `number` says which of many."""
        return pack_weights({name: torch.from_numpy(array) for name, array in self.tensors().items()}, number)

    @classmethod
    def unpacked(cls, update: WeightUpdate) -> "Heads":
        """What was sent; ValueError when it is not what arrived."""
        return cls.of_tensors({name: tensor.numpy() for name, tensor in unpack_weights(update).items()})


def rows_of(queries: Sequence[PrefixQuery], states: Iterable[np.ndarray]) -> np.ndarray:
    """Rows [asked positions, width] (float32): of every position, query by query, state and features beside it."""
    features: list[list[float]] = []
    for query in queries:
        before = len(query.turn_logprobs) - len(query.positions)
        for number, position in enumerate(query.positions, start=1):
            turns = query.turn_logprobs[: max(0, before + number)]
            features.append(history_features(turns, position, query.prompt_value))
    return np.concatenate([np.stack(list(states)), np.array(features, dtype=np.float32)], axis=1)


def vector(state: HiddenState) -> np.ndarray:
    """[width], float32."""
    return np.frombuffer(state.values, dtype=np.float32)


def fullest(keys: Sequence[bytes], states: Sequence[HiddenState]) -> list[HiddenState]:
    """Of equal histories (equal keys) the state that was read from the most tokens.

    Rollouts of a prompt often begin alike; the engine then computes what they share for one of them only, and for the
    others nothing but the last token.
    """
    best: dict[bytes, HiddenState] = {}
    for key, state in zip(keys, states, strict=True):
        if key not in best or state.num_tokens > best[key].num_tokens:
            best[key] = state
    return [best[key] for key in keys]
