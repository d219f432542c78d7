"""Read the policy's own hidden states at the ends of prefixes.

The trunk is the policy's embedding and its first layers, at the weights that the generators serve: they arrive at every
update with version and checksum. Only the layers that are read are kept and computed, no key or value is kept between
questions, and what the prefixes of a call share is computed once, so a question costs a fraction of the policy's own
prefill. Nothing here learns: no gradient reaches the trunk.
"""

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from trace_async.engine import WeightSyncError
from trace_async.packing.attention import attention_for, hidden_states, prepare_model
from trace_async.policy.load import load_model
from trace_async.predictor.questions import lay_out_queries
from trace_async.types import PrefixQuery
from trace_async.weights import WeightBucket, WeightCount, WeightManifest


class PolicyTrunk:
    """The first `num_layers` layers of the policy (0: all) and its final norm; a history's state is the mean over its
    `num_last` last tokens. `version`: of the weights it holds."""

    def __init__(self, path: str | Path, *, num_layers: int, num_last: int, device: str) -> None:
        policy = load_model(path, device=device)
        self._prefix = f"{policy.base_model_prefix}."
        self._trunk = policy.base_model
        self._layers = self._trunk.layers[: num_layers or None]
        self._run(0)
        self._trunk.requires_grad_(False)
        self._kind = attention_for(torch.device(device), flat=False)
        prepare_model(self._trunk, self._kind)
        self._num_last = num_last
        self._checksum = ""
        self.width: int = self._trunk.config.hidden_size
        self.version = 0
        self.synced_bytes = 0
        self.sync_s = 0.0

    @torch.no_grad()
    def read(self, queries: Sequence[PrefixQuery], num_layers: int = 0) -> np.ndarray:
        """States [asked prefixes, width] (float32) after `num_layers` layers (0: all that it has), query by query, each
        position in order; one forward for all."""
        self._run(num_layers)
        asked = lay_out_queries(queries, num_last=self._num_last)
        hidden = hidden_states(self._trunk, asked.layout, self._kind)
        last = hidden.index_select(0, torch.from_numpy(asked.rows).to(hidden.device)).float().cpu().numpy()
        counts = np.diff([*asked.starts, len(asked.rows)])
        means: np.ndarray = np.add.reduceat(last, asked.starts, axis=0) / counts[:, None].astype(np.float32)
        return means

    def receive(self, buckets: Sequence[WeightBucket], manifest: WeightManifest) -> None:
        """Take the weights that the generators were sent, after checking every byte of them.

        WeightSyncError when the checksum differs, when they are those of an older version, or when a tensor of the
        trunk is not among them; the weights are then as they were.
        """
        started = time.monotonic()
        arrived = WeightCount()
        tensors: dict[str, np.ndarray] = {}
        bfloat16_names: set[str] = set()
        for bucket in buckets:
            arrived.add(bucket)
            tensors.update(bucket.tensors)
            bfloat16_names |= bucket.bfloat16_names
        found = arrived.manifest(manifest.policy_version)
        if found != manifest:
            raise WeightSyncError(f"the predictor was sent weights {manifest} and received {found}")
        if found.checksum == self._checksum and found.policy_version == self.version:
            return  # the same version again is no error: whoever is not sure that it arrived may send it twice
        if found.checksum == self._checksum:
            raise WeightSyncError(
                f"weights version {manifest.policy_version} are those of version {self.version}: nothing changed"
            )
        self._run(0)
        missing = [name for name, _ in self._named_tensors() if name not in tensors]
        if missing:
            raise WeightSyncError(f"the predictor's trunk needs {missing[:3]}, which were not sent")
        for name, parameter in self._named_tensors():
            tensor = torch.from_numpy(np.array(tensors[name]))  # a copy: arrays of Ray's object store are read-only
            parameter.copy_(tensor.view(torch.bfloat16) if name in bfloat16_names else tensor)
        self._checksum, self.version = found.checksum, found.policy_version
        self.synced_bytes += found.num_bytes
        self.sync_s += time.monotonic() - started

    def _run(self, num_layers: int) -> None:
        """Compute only so many layers from now on; 0: all."""
        self._trunk.layers = self._layers[: num_layers or None]
        self._trunk.config.num_hidden_layers = len(self._trunk.layers)

    def _named_tensors(self) -> list[tuple[str, torch.Tensor]]:
        return [(self._prefix + name, parameter.data) for name, parameter in self._trunk.named_parameters()]
