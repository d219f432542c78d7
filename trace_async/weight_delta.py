"""Send only the elements of the weights that changed.

        sender     what was sent last ─┐                     receiver    what was received last
                   the new weights ────┴─► WeightDelta ─────────────────► + the delta ─► the new weights, whole

Elements are compared and replaced as raw bits, so nothing is rounded. The receiver computes the checksum of the whole
result as it does for weights that were sent whole (`WeightManifest`), and so finds every mistake in between.

Example: of [1, 2, 3, 4] the third becomes 5. The delta holds index 2 and the bits of 5: 8 bytes in place of 16.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from trace_async.weights import WeightBucket

MAX_SHARE = 0.5
"""A delta of more than this share of the whole is not worth its comparison: the whole is sent."""


@dataclass(frozen=True, slots=True)
class TensorDelta:
    """What changed in one tensor."""

    indices: np.ndarray | None
    """uint32 positions in the flattened tensor, ascending (None: `bits` are all of it)."""
    bits: np.ndarray
    """The new elements at those positions, as unsigned integers of the same size."""

    @property
    def num_bytes(self) -> int:
        return self.bits.nbytes + (0 if self.indices is None else self.indices.nbytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightDelta:
    """What changed in all weights since `base_version`."""

    base_version: int
    tensors: Mapping[str, TensorDelta]
    """Name → change, of the tensors in which anything changed."""

    @property
    def num_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.tensors.values())


class DeltaEncoder:
    """Keeps a copy of the weights that were sent last, and finds what differs in those that are sent now."""

    def __init__(self) -> None:
        self._sent: dict[str, np.ndarray] = {}
        self._version: int | None = None
        self._found: dict[str, TensorDelta] = {}
        self._is_comparable = True
        self._passed: set[str] = set()

    def add(self, bucket: WeightBucket) -> None:
        """Compare some of the new weights, and keep a copy of them."""
        for name, array in bucket.tensors.items():
            new = _bits(array)
            old = self._sent.get(name)
            self._passed.add(name)
            if old is None or old.shape != new.shape or old.dtype != new.dtype:
                self._is_comparable = False
                self._sent[name] = new.copy()
                continue
            changed = np.flatnonzero(old != new)
            if not len(changed):
                continue
            if len(changed) * (4 + new.itemsize) < new.nbytes and new.size <= 2**32:
                self._found[name] = TensorDelta(changed.astype(np.uint32), new[changed])
            else:
                self._found[name] = TensorDelta(None, new.copy())
            old[changed] = new[changed]

    def finish(self, policy_version: int) -> WeightDelta | None:
        """Return what changed since the weights before these; None when the whole has to be sent.

        That is so the first time, when tensors came or went, and when more than MAX_SHARE would be sent.
        """
        base, found, is_comparable = self._version, self._found, self._is_comparable
        is_comparable = is_comparable and self._passed == self._sent.keys()
        self._sent = {name: self._sent[name] for name in self._passed}
        self._version, self._found, self._is_comparable, self._passed = policy_version, {}, True, set()
        if base is None or not is_comparable:
            return None
        delta = WeightDelta(base_version=base, tensors=found)
        whole = sum(array.nbytes for array in self._sent.values())
        return delta if delta.num_bytes <= MAX_SHARE * whole else None


def apply_delta(base: Mapping[str, np.ndarray], delta: WeightDelta) -> None:
    """Turn the weights of `delta.base_version` into the new ones, in place. Raises ValueError when they do not fit."""
    for name, change in delta.tensors.items():
        if name not in base:
            raise ValueError(f"a delta of weights changes {name}, which is not there")
        bits = _bits(base[name])
        if bits.dtype != change.bits.dtype:
            raise ValueError(f"a delta of weights has {change.bits.dtype} for {name}, whose elements are {bits.dtype}")
        if change.indices is None:
            if bits.shape != change.bits.shape:
                raise ValueError(f"a delta of weights has {change.bits.size} elements for {name}, not {bits.size}")
            bits[:] = change.bits
        else:
            if len(change.indices) and change.indices[-1] >= bits.size:
                raise ValueError(f"a delta of weights changes element {change.indices[-1]} of {name}: {bits.size}")
            bits[change.indices] = change.bits


def _bits(array: np.ndarray) -> np.ndarray:
    """The elements, flattened, as unsigned integers that share their memory: equal only where all bits are."""
    return array.reshape(-1).view(f"u{array.itemsize}")
