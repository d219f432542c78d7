"""Carry named weights together with their version and checksum.

The checksum proves that what arrives at a generator is what the learner sent.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import xxhash
from safetensors.torch import load_file


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightManifest:
    """Identifies one version of the weights."""

    policy_version: int
    checksum: str
    """xxh3-128 over the names, shapes and dtypes of all tensors and every byte of them."""
    num_tensors: int
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightUpdate:
    """Weights on their way to an engine, either in memory (`tensors`) or on a disk that the engine reads (`path`)."""

    manifest: WeightManifest
    tensors: Mapping[str, np.ndarray] | None = None
    """Name → array, a view of shared memory that nobody has copied. numpy has no bfloat16, so such a tensor travels
    as its raw uint16 bits and its name stands in `bfloat16_names`."""
    bfloat16_names: frozenset[str] = frozenset()
    path: Path | None = None
    """A Hugging Face directory."""

    def __post_init__(self) -> None:
        if (self.tensors is None) == (self.path is None):
            raise ValueError("WeightUpdate: give either tensors or a path")


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightBucket:
    """Some of the weights, on the host. The fields mean the same as in `WeightUpdate`."""

    tensors: Mapping[str, np.ndarray]
    bfloat16_names: frozenset[str] = frozenset()


class WeightCount:
    """Compute the manifest of weights that pass by in buckets, without keeping any of them."""

    def __init__(self) -> None:
        self._digests: dict[str, str] = {}
        self._num_bytes = 0

    def add(self, bucket: WeightBucket) -> None:
        for name, array in bucket.tensors.items():
            dtype = "bfloat16" if name in bucket.bfloat16_names else str(array.dtype)
            content = xxhash.xxh3_128_hexdigest(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            self._digests[name] = f"{name}|{dtype}|{array.shape}|{content}"
            self._num_bytes += array.nbytes

    def manifest(self, policy_version: int) -> WeightManifest:
        """Return the manifest of everything added so far.

        It depends neither on the order of the tensors nor on how they were split into buckets.
        """
        # Sorted, because engines and disks list the same tensors in other orders.
        lines = "\n".join(self._digests[name] for name in sorted(self._digests))
        return WeightManifest(
            policy_version=policy_version,
            checksum=xxhash.xxh3_128_hexdigest(lines.encode()),
            num_tensors=len(self._digests),
            num_bytes=self._num_bytes,
        )


def host_bucket(state: Mapping[str, torch.Tensor]) -> WeightBucket:
    """Bring the tensors to the host.

    A tensor that is on the host already and contiguous is not copied: the bucket shares its memory.
    """
    tensors: dict[str, np.ndarray] = {}
    bfloat16_names: set[str] = set()
    for name, tensor in state.items():
        host = tensor.detach().to("cpu", copy=False).contiguous()
        if host.dtype == torch.bfloat16:
            bfloat16_names.add(name)
            host = host.view(torch.uint16)  # numpy has no bfloat16
        tensors[name] = host.numpy()
    return WeightBucket(tensors=tensors, bfloat16_names=frozenset(bfloat16_names))


def join_buckets(buckets: Iterable[WeightBucket], manifest: WeightManifest) -> WeightUpdate:
    """Join the buckets to one update. The arrays are not copied."""
    tensors: dict[str, np.ndarray] = {}
    bfloat16_names: frozenset[str] = frozenset()
    for bucket in buckets:
        tensors.update(bucket.tensors)
        bfloat16_names |= bucket.bfloat16_names
    return WeightUpdate(manifest=manifest, tensors=tensors, bfloat16_names=bfloat16_names)


def pack_weights(state: Mapping[str, torch.Tensor], policy_version: int) -> WeightUpdate:
    """Bring `state` to the host and compute its manifest.

    Tied tensors must appear only once in `state`; the caller drops the aliases.
    """
    bucket, count = host_bucket(state), WeightCount()
    count.add(bucket)
    return join_buckets([bucket], count.manifest(policy_version))


def unpack_weights(update: WeightUpdate) -> dict[str, torch.Tensor]:
    """Return the tensors of an update that travels in memory.

    Raises ValueError when they differ from the manifest.
    """
    if update.tensors is None:
        raise ValueError("this update travels by disk; read it from its path")
    count = WeightCount()
    count.add(WeightBucket(tensors=update.tensors, bfloat16_names=update.bfloat16_names))
    found = count.manifest(update.manifest.policy_version).checksum
    if found != update.manifest.checksum or len(update.tensors) != update.manifest.num_tensors:
        raise ValueError(
            f"weights version {update.manifest.policy_version}: checksum {found} of {len(update.tensors)} tensors "
            f"does not match the sent {update.manifest.checksum} of {update.manifest.num_tensors}"
        )
    result: dict[str, torch.Tensor] = {}
    for name, array in update.tensors.items():
        # Copies, because arrays from Ray's object store are read-only.
        tensor = torch.from_numpy(array.copy())
        result[name] = tensor.view(torch.bfloat16) if name in update.bfloat16_names else tensor
    return result


def read_weights(update: WeightUpdate) -> dict[str, torch.Tensor]:
    """Return the tensors of an update, whether it travels in memory or on disk.

    On disk, every `*.safetensors` file of the directory is read. Raises ValueError when the tensors differ from the
    manifest.
    """
    if update.path is None:
        return unpack_weights(update)
    files = sorted(update.path.glob("*.safetensors"))
    if not files:
        raise ValueError(f"weights version {update.manifest.policy_version}: no *.safetensors in {update.path}")
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        tensors.update(load_file(file))
    found = pack_weights(tensors, update.manifest.policy_version).manifest
    if found != update.manifest:
        raise ValueError(f"weights in {update.path} are {found}, not what was sent: {update.manifest}")
    return tensors
