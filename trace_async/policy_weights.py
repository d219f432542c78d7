"""The policy's tensors by their Hugging Face names, whatever trains them: ZeRO-3 gathered in buckets, LoRA merged."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from trace_async.deepspeed_engine import whole_parameters

BUCKET_BYTES = 256 * 1024 * 1024
LORA_SCALE = 2
_LORA_BASE = ".base_layer."


def add_lora(policy: Any, rank: int, *, seed: int) -> None:
    """Inject LoRA adapters (arXiv 2106.09685) into every linear layer but the head; from then on only they train.

    alpha = LORA_SCALE · rank, so W = W₀ + LORA_SCALE · B A.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ValueError(f"learner.lora_rank={rank}: install peft (pip install trace-async[lora])") from error
    head = policy.get_output_embeddings()
    targets = [name for name, module in policy.named_modules() if isinstance(module, nn.Linear) and module is not head]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=LORA_SCALE * rank, target_modules=targets), policy)


def policy_tensors(policy: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of the plain model; called on all ranks. A tensor is whole only until the next one is asked for.

    Tied parameters appear once, under the name of the first (transformers ties the head to the embedding).
    """
    wanted: list[tuple[str, nn.Parameter, Any]] = []
    for name, parameter in policy.named_parameters():
        if ".lora_" in name:
            continue
        layer = policy.get_submodule(name.rpartition(_LORA_BASE)[0]) if _LORA_BASE in name else None
        wanted.append((name.replace(_LORA_BASE, "."), parameter, layer if name.endswith("weight") else None))
    bucket: list[tuple[str, nn.Parameter, Any]] = []
    for entry in wanted:
        bucket.append(entry)
        if sum(_bytes(parameter) for _, parameter, _ in bucket) >= BUCKET_BYTES:
            yield from _gathered(bucket)
            bucket = []
    yield from _gathered(bucket)


def _gathered(bucket: list[tuple[str, nn.Parameter, Any]]) -> Iterator[tuple[str, torch.Tensor]]:
    adapters = [p for _, _, layer in bucket if layer is not None for n, p in layer.named_parameters() if "lora_" in n]
    with whole_parameters([parameter for _, parameter, _ in bucket] + adapters), torch.no_grad():
        for name, parameter, layer in bucket:
            yield (
                name,
                parameter if layer is None else parameter + layer.get_delta_weight("default").to(parameter.dtype),
            )


def _bytes(parameter: nn.Parameter) -> int:
    return getattr(parameter, "ds_numel", parameter.numel()) * parameter.element_size()


def merged(values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Full tensors by their names in a policy with or without adapters → the plain model's tensors by name."""
    result = {}
    for name, tensor in values.items():
        if ".lora_" in name:
            continue
        adapter = name.removesuffix("base_layer.weight") if name.endswith("base_layer.weight") else None
        if adapter is not None:
            a, b = (values[f"{adapter}lora_{part}.default.weight"].float() for part in "AB")
            tensor = (tensor.float() + LORA_SCALE * b @ a).to(tensor.dtype)
        result[name.replace(_LORA_BASE, ".")] = tensor
    return result
