"""Weights on their way to a server on the same machine: as one safetensors file in shared memory or on disk.

Two checks stand on the receiving side. What lies in the file is read back and must have the manifest's checksum, so
bytes that were corrupted on the way never reach the engine. And where the engine can say what it holds, the digests of
its own parameters are compared with those of the tensors that were sent (`expected_digests`).
"""

import hashlib
import json
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from trace_async.engine import WeightSyncError
from trace_async.weights import WeightUpdate, pack_weights, read_weights

# Engines keep these Hugging Face parameters concatenated, in this order.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def tensors_of(update: WeightUpdate) -> dict[str, torch.Tensor]:
    """The tensors of an update that travels in memory, neither copied nor checked; they must not be written to."""
    assert update.tensors is not None
    tensors = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        for name, array in update.tensors.items():
            tensor = torch.from_numpy(array)
            tensors[name] = tensor.view(torch.bfloat16) if name in update.bfloat16_names else tensor
    return tensors


def checked_tensors(update: WeightUpdate) -> dict[str, torch.Tensor]:
    """`read_weights`, with everything that may be wrong with the update as WeightSyncError."""
    try:
        return read_weights(update)
    except (ValueError, OSError) as error:
        raise WeightSyncError(str(error)) from error


@contextmanager
def weight_folder(
    update: WeightUpdate, *, folders: tuple[Path, ...]
) -> Iterator[tuple[Path, Mapping[str, torch.Tensor]]]:
    """A folder that holds the update as safetensors, and the tensors as read back from there and checked.

    It is made in the first of `folders` that has room to spare and removed afterwards; an update that already travels
    by path stays where it is. Raises WeightSyncError when what lies there is not what was sent.
    """
    if update.path is not None:
        yield update.path, checked_tensors(update)
        return
    parent = next((f for f in folders[:-1] if shutil.disk_usage(f).free > 2 * update.manifest.num_bytes), folders[-1])
    folder = Path(tempfile.mkdtemp(prefix="weights_", dir=parent))
    try:
        save_file(tensors_of(update), folder / "model.safetensors", metadata={"format": "pt"})
        yield folder, checked_tensors(WeightUpdate(manifest=update.manifest, path=folder))
    finally:
        shutil.rmtree(folder)


def expected_digests(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, str]:
    """SHA-256 (hex) of the tensors in the engine's `dtype`, by the name under which it holds them, fused ones too.

    Engines report the same digest, or its first 16 digits, for parameters that they keep as they came.
    """
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    digests = {name: _sha256(tensor) for name, tensor in tensors.items()}
    for name in tensors:
        for fused, parts in FUSED.items():
            if f".{parts[0]}." in name:
                names = [name.replace(parts[0], part) for part in parts]
                digests[name.replace(parts[0], fused)] = _sha256(*(tensors[part] for part in names))
    return digests


def load_start_weights(policy_path: Path) -> WeightUpdate:
    """Version 0: the weights that a server loads from its model directory, tied aliases dropped."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(policy_path.glob("*.safetensors")):
        tensors.update(load_file(file))
    if json.loads((policy_path / "config.json").read_text()).get("tie_word_embeddings"):
        tensors.pop("lm_head.weight", None)
    return pack_weights(tensors, 0)


def _sha256(*tensors: torch.Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
