"""Runs inside vLLM's workers (`--worker-extension-cls weight_receiver.WeightReceiver`), beside nothing else of ours."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open


class WeightReceiver:
    """Methods that vLLM adds to its Worker class; called through `/collective_rpc`."""

    def receive_weights(self, folder: str) -> dict[str, str]:
        """Load every safetensors file in `folder`; returns the SHA-256 of each tensor as it went into the loader.

        vLLM repacks parameters for its kernels, so afterwards they could not be compared with what was sent.
        """
        runner = self.model_runner  # type: ignore[attr-defined]
        digests: dict[str, str] = {}
        dtype = runner.model_config.dtype

        def tensors() -> Iterator[tuple[str, torch.Tensor]]:
            for file in sorted(Path(folder).glob("*.safetensors")):
                with safe_open(file, framework="pt") as opened:
                    for name in opened.keys():  # noqa: SIM118 (not a dict)
                        tensor = opened.get_tensor(name).to(dtype)
                        flat = tensor.contiguous().reshape(-1).view(torch.uint8)
                        digests[name] = hashlib.sha256(flat.numpy()).hexdigest()
                        yield name, tensor

        runner.reload_weights(weights_iterator=tensors())
        self._repack_tied_head(runner.get_model())
        return digests

    def _repack_tied_head(self, model: torch.nn.Module) -> None:
        """On the CPU vLLM 0.32 keeps a packed copy of tied embeddings for the head, which a reload leaves stale."""
        config = self.model_runner.model_config.hf_config  # type: ignore[attr-defined]
        head = getattr(model, "lm_head", None)
        if head is None or not config.tie_word_embeddings or next(model.parameters()).device.type != "cpu":
            return
        head.weight = model.get_parameter("model.embed_tokens.weight")
        head.quant_method.process_weights_after_loading(head)
