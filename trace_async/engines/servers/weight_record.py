"""Record what a server is known to hold, and prove at the receiving end that weights arrived.

Servers report digests of their own parameters. We cannot compute all of these digests ourselves, because a parameter
may be repacked for a kernel or split between GPUs. Which ones we can is found out once, with the weights that the
server starts from. For these parameters every later update is proved byte by byte. All together must show that
something changed.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch

from trace_async.engine import WeightSyncError
from trace_async.engines.servers.weight_files import checked_tensors, load_start_weights
from trace_async.weights import WeightManifest, WeightUpdate

Tensors = Mapping[str, torch.Tensor]
Digests = Mapping[str, str]

RECEIVED = "received:"  # stands before the name of a tensor that was digested as it reached the server's loader
# Engines keep these Hugging Face parameters concatenated, in this order.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


class WeightRecord:
    """Knows the version, the checksum and the shapes of what one server holds."""

    def __init__(
        self, policy_path: Path, dtype: torch.dtype, found: Digests, start: WeightUpdate | None = None
    ) -> None:
        """Begin with the weights of `policy_path`, or `start`, as version 0.

        `found` are the digests that the fresh server reports. `dtype` is the one to which the engine casts what it
        loads.
        """
        update = start or load_start_weights(policy_path)
        tensors = checked_tensors(update)
        self.policy_version = 0
        self._policy_path = policy_path
        self._dtype = dtype
        self._checksum = update.manifest.checksum
        self._shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        expected = expected_digests(tensors, dtype)
        self.provable = frozenset(name for name in found if _matches(found[name], expected.get(name)))

    def has(self, manifest: WeightManifest) -> bool:
        """Return whether the server holds these weights. Raises WeightSyncError when it does under another version."""
        if manifest.checksum != self._checksum:
            return False
        if manifest.policy_version != self.policy_version:
            raise WeightSyncError(
                f"weights version {manifest.policy_version} are the same as those of version {self.policy_version}"
            )
        return True

    def require_names(self, tensors: Tensors) -> None:
        """Raise WeightSyncError unless names and shapes are those of the policy."""
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        wrong = sorted(name for name in shapes.keys() | self._shapes if shapes.get(name) != self._shapes.get(name))
        if wrong:
            raise WeightSyncError(
                f"{len(wrong)} weights are missing, unknown or of another shape than in {self._policy_path}, "
                f"such as {wrong[0]}: {shapes.get(wrong[0])} instead of {self._shapes.get(wrong[0])}"
            )

    def require_loaded(self, tensors: Tensors, found: Digests) -> None:
        """Raise WeightSyncError unless every parameter whose digest can be computed here holds what was sent."""
        expected = expected_digests(tensors, self._dtype)
        shown = [name for name in found if name in self.provable or name.startswith(RECEIVED)]
        wrong = sorted(name for name in shown if not _matches(found[name], expected.get(name.removeprefix(RECEIVED))))
        if wrong:
            raise WeightSyncError(f"the engine holds other weights than were sent: {wrong[:3]} (of {len(wrong)})")

    def set(self, manifest: WeightManifest) -> None:
        self.policy_version, self._checksum = manifest.policy_version, manifest.checksum


def expected_digests(tensors: Tensors, dtype: torch.dtype) -> dict[str, str]:
    """Return the SHA-256 (hex) of the tensors in the engine's `dtype`, by its own names, fused ones included."""
    cast = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    digests = {name: _sha256(tensor) for name, tensor in cast.items()}
    for name in cast:
        for fused, parts in FUSED.items():
            if f".{parts[0]}." in name:
                names = [name.replace(parts[0], part) for part in parts]
                digests[name.replace(parts[0], fused)] = _sha256(*(cast[part] for part in names))
    return digests


def _sha256(*tensors: torch.Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _matches(found: str, expected: str | None) -> bool:
    """Compare two digests. Engines report all 64 hexadecimal digits of a SHA-256, or its first 16."""
    return expected is not None and len(found) in (16, 64) and expected.startswith(found)
