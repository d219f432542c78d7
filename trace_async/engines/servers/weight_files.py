"""Bring weights to a server on the same machine as one safetensors file, in shared memory or on disk.

The file is read back and must have the manifest's checksum, so bytes that were corrupted on the way never reach the
engine. weight_record.py checks what the engine then holds.
"""

import asyncio
import json
import shutil
import tempfile
import warnings
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from trace_async.engine import WeightSyncError
from trace_async.engines.servers.shared_file import link_or_write, unlink
from trace_async.weights import WeightUpdate, pack_weights, read_weights


def tensors_of(update: WeightUpdate) -> dict[str, torch.Tensor]:
    """Return the tensors of an update that travels in memory, neither copied nor checked.

    They must not be written to, because they share memory with Ray's object store.
    """
    assert update.tensors is not None
    tensors = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        for name, array in update.tensors.items():
            tensor = torch.from_numpy(array)
            tensors[name] = tensor.view(torch.bfloat16) if name in update.bfloat16_names else tensor
    return tensors


def checked_tensors(update: WeightUpdate) -> dict[str, torch.Tensor]:
    """Do what `read_weights` does, but raise WeightSyncError for everything that may be wrong with the update."""
    try:
        return read_weights(update)
    except (ValueError, OSError) as error:
        raise WeightSyncError(str(error)) from error


@asynccontextmanager
async def weight_folder(
    update: WeightUpdate, *, folders: tuple[Path, ...]
) -> AsyncIterator[tuple[Path, dict[str, torch.Tensor]]]:
    """Provide a folder that holds the update as safetensors, and the tensors as read back from there and checked.

    It is made in the first of `folders` that has room to spare, and removed afterwards. An update that already travels
    by path stays where it is. Engines of one machine that are updated at the same time share the file
    (shared_file.py). Raises WeightSyncError when the file does not hold what was sent.
    """
    if update.path is not None:
        yield update.path, await asyncio.to_thread(checked_tensors, update)
        return
    parent = next((f for f in folders[:-1] if shutil.disk_usage(f).free > 2 * update.manifest.num_bytes), folders[-1])
    folder = Path(tempfile.mkdtemp(prefix="weights_", dir=parent))

    file = folder / "model.safetensors"

    def read_back() -> dict[str, torch.Tensor]:
        return checked_tensors(WeightUpdate(manifest=update.manifest, path=folder))

    def provide() -> dict[str, torch.Tensor]:
        written: list[dict[str, torch.Tensor]] = []

        def write(path: Path) -> None:
            save_file(tensors_of(update), path, metadata={"format": "pt"})
            written.append(read_back())  # checked before others are given the file

        link_or_write(file, f"{update.manifest.checksum}.safetensors", write)
        return written[0] if written else read_back()

    def remove() -> None:
        if file.exists():
            unlink(file)
        shutil.rmtree(folder)

    try:
        yield folder, await asyncio.to_thread(provide)
    finally:
        await asyncio.to_thread(remove)


def load_start_weights(policy_path: Path) -> WeightUpdate:
    """Return version 0: the weights that a server loads from its model directory, without tied aliases."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(policy_path.glob("*.safetensors")):
        tensors.update(load_file(file))
    if json.loads((policy_path / "config.json").read_text()).get("tie_word_embeddings"):
        tensors.pop("lm_head.weight", None)
    return pack_weights(tensors, 0)
