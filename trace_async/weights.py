"""Named weights with version and checksum: what arrives at a generator must be what the learner sent."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import xxhash
from safetensors.torch import load_file


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightManifest:
    """Identifies one version of the weights. `checksum` covers names, shapes, dtypes and every byte."""

    policy_version: int
    checksum: str
    num_tensors: int
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightUpdate:
    """Weights on their way to an engine, on one of two paths.

    `tensors`: name → array, zero-copy out of shared memory (bfloat16 travels as its raw uint16 bits, its name
    listed in `bfloat16_names`); or `path`: a Hugging Face directory on a disk that the engine reads.
    """

    manifest: WeightManifest
    tensors: Mapping[str, np.ndarray] | None = None
    bfloat16_names: frozenset[str] = frozenset()
    path: Path | None = None

    def __post_init__(self) -> None:
        if (self.tensors is None) == (self.path is None):
            raise ValueError("WeightUpdate: give either tensors or a path")


def checksum_arrays(named: Iterable[tuple[str, str, np.ndarray]]) -> str:
    """xxh3-128 over (name, dtype name, array) in name order, independent of the order given."""
    digest = xxhash.xxh3_128()
    for name, dtype, array in sorted(named, key=lambda entry: entry[0]):
        digest.update(f"{name}|{dtype}|{array.shape}|".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def pack_weights(state: Mapping[str, torch.Tensor], policy_version: int) -> WeightUpdate:
    """Host copies of `state` with their manifest. Tied tensors must appear once (the caller drops aliases)."""
    tensors: dict[str, np.ndarray] = {}
    bfloat16_names: set[str] = set()
    for name, tensor in state.items():
        host = tensor.detach().to("cpu", copy=False).contiguous()
        if host.dtype == torch.bfloat16:
            bfloat16_names.add(name)
            host = host.view(torch.uint16)
        tensors[name] = host.numpy()
    bf16 = frozenset(bfloat16_names)
    return WeightUpdate(
        manifest=WeightManifest(
            policy_version=policy_version,
            checksum=checksum_arrays(_named(tensors, bf16)),
            num_tensors=len(tensors),
            num_bytes=sum(array.nbytes for array in tensors.values()),
        ),
        tensors=tensors,
        bfloat16_names=bf16,
    )


def unpack_weights(update: WeightUpdate) -> dict[str, torch.Tensor]:
    """The tensors of an update that travels in memory, checked against its manifest (ValueError when they differ)."""
    if update.tensors is None:
        raise ValueError("this update travels by disk; read it from its path")
    found = checksum_arrays(_named(update.tensors, update.bfloat16_names))
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
    """The checked tensors of an update on either path; ValueError when they differ from its manifest.

    On the disk path every `*.safetensors` file of the directory is read.
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


def _named(tensors: Mapping[str, np.ndarray], bfloat16_names: frozenset[str]) -> Iterable[tuple[str, str, np.ndarray]]:
    return ((name, "bfloat16" if name in bfloat16_names else str(a.dtype), a) for name, a in tensors.items())
