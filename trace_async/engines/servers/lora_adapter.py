"""Give a server a LoRA adapter that it adds to the start policy itself, as tensors by name and as peft's folder."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from trace_async.learner.policy_tensors import LORA_SCALE
from trace_async.weights import WeightUpdate, pack_weights

ADAPTER = "policy"  # its name in the server
_NO_LAYERS = ("embed_tokens.weight", "lm_head.weight")


def start_adapter(policy_path: Path, rank: int) -> WeightUpdate:
    """Return version 0, which changes nothing, because all its tensors are zeros.

    They are `<layer>.lora_A.weight` [rank, in] and `<layer>.lora_B.weight` [out, rank] for every linear layer but the
    head, as `policy_tensors.add_lora` makes them.
    """
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(policy_path.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (not a dict)
                shape = opened.get_slice(name).get_shape()
                if len(shape) == 2 and not name.endswith(_NO_LAYERS):
                    layer = name.removesuffix(".weight")
                    tensors[f"{layer}.lora_A.weight"] = torch.zeros(rank, shape[1])
                    tensors[f"{layer}.lora_B.weight"] = torch.zeros(shape[0], rank)
    return pack_weights(tensors, 0)


def write_adapter(folder: Path, tensors: Mapping[str, torch.Tensor], rank: int) -> None:
    """Write the adapter into `folder`, which is made, over what is there."""
    folder.mkdir(exist_ok=True)
    layers = {name.partition(".lora_")[0].rpartition(".")[2] for name in tensors}
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": LORA_SCALE * rank,
        "target_modules": sorted(layers),
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(dict(tensors), folder / "adapter_model.safetensors", metadata={"format": "pt"})
