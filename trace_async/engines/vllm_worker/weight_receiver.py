"""Receive weights inside vLLM's workers (`--worker-extension-cls weight_receiver.WeightReceiver`).

Nothing else of ours can be imported there but the files in this folder.
"""

import collections
import hashlib
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from weight_group import WeightGroup

Named = Iterator[tuple[str, torch.Tensor]]


class WeightReceiver:
    """Methods that vLLM adds to its Worker class. They are called through `/collective_rpc`."""

    _weight_group: WeightGroup | None = None

    def receive_weights(self, folder: str) -> dict[str, str]:
        """Load every safetensors file in `folder`. Returns digests (see `_load_weights`)."""

        def tensors() -> Named:
            for file in sorted(Path(folder).glob("*.safetensors")):
                with safe_open(file, framework="pt") as opened:
                    for name in opened.keys():  # noqa: SIM118 (not a dict)
                        yield name, opened.get_tensor(name)

        return self._load_weights(tensors())

    def receive_adapter(self, name: str, folder: str) -> dict[str, str]:
        """Replace the LoRA adapter by the one in `folder` (peft's files). Returns the SHA-256 of its tensors.

        The server's own endpoint is not used, because with it every later request would load the files anew at each of
        its steps, and requests in flight would keep the old adapter.
        """
        from vllm.lora.request import LoRARequest

        (number,) = self.list_loras()  # type: ignore[attr-defined]
        request = LoRARequest(lora_name=name, lora_int_id=number, lora_path=folder, load_inplace=True)
        if not self.add_lora(request):  # type: ignore[attr-defined]
            raise RuntimeError(f"the adapter in {folder} was not loaded")
        dtype = self.model_runner.model_config.dtype  # type: ignore[attr-defined]
        tensors = load_file(Path(folder) / "adapter_model.safetensors")
        return {key: _sha256(tensor.to(dtype)) for key, tensor in tensors.items()}

    def join_weight_group(self, port: int, name: str, world_size: int, backend: str, timeout_s: float) -> None:
        """Join a group in which rank 0 will broadcast weights, and leave the one that was joined before."""
        if self._weight_group is not None:
            self._weight_group.close()
        self._weight_group = WeightGroup(
            port=port,
            name=name,
            rank=1 + self.rank,  # type: ignore[attr-defined]
            world_size=world_size,
            backend=backend,
            device=self.device if backend == "nccl" else torch.device("cpu"),  # type: ignore[attr-defined]
            timeout_s=timeout_s,
        )

    def receive_broadcast(
        self, group_name: str, names: list[str], dtypes: list[str], shapes: list[list[int]]
    ) -> dict[str, str]:
        """Load what rank 0 of the group sends, one tensor after the other. Returns digests (see `_load_weights`)."""
        group = self._weight_group
        assert group is not None, "no weight group was joined"
        assert group.name == group_name, f"a member of {group.name}, not of {group_name}"

        def tensors() -> Named:
            for name, dtype, shape in zip(names, dtypes, shapes, strict=True):
                yield name, group.receive(shape, getattr(torch, dtype))

        received = tensors()
        try:
            return self._load_weights(received)
        finally:
            # The sender waits until everything is taken. Take the rest even if the loader gave up in between.
            collections.deque(received, maxlen=0)

    def _load_weights(self, tensors: Named) -> dict[str, str]:
        """Load the tensors and return the SHA-256 of each as it went into the loader.

        vLLM repacks parameters for its kernels, so afterwards they could not be compared with what was sent.
        """
        runner = self.model_runner  # type: ignore[attr-defined]
        digests: dict[str, str] = {}
        dtype = runner.model_config.dtype

        def with_digests() -> Named:
            for name, sent in tensors:
                tensor = sent.to(dtype)
                digests[name] = _sha256(tensor)
                yield name, tensor

        runner.reload_weights(weights_iterator=with_digests())
        self._repack_tied_head(runner.get_model())
        return digests

    def _repack_tied_head(self, model: torch.nn.Module) -> None:
        """Renew the packed copy of tied embeddings that vLLM 0.32 keeps for the head on the CPU.

        A reload leaves it stale.
        """
        config = self.model_runner.model_config.hf_config  # type: ignore[attr-defined]
        head = getattr(model, "lm_head", None)
        if head is None or not config.tie_word_embeddings or next(model.parameters()).device.type != "cpu":
            return
        head.weight = model.get_parameter("model.embed_tokens.weight")
        head.quant_method.process_weights_after_loading(head)


def _sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data).hexdigest()
