"""The policy's tensors by their Hugging Face names, whatever trains them: ZeRO-3 gathered in buckets, LoRA merged."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from trace_async.learner.deepspeed import whole_parameters

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


def policy_buckets(policy: Any, bucket_bytes: int, *, adapter_only: bool = False) -> Iterator[dict[str, torch.Tensor]]:
    """The plain model's tensors by name, `bucket_bytes` at a time (or one tensor that is larger), on all ranks alike.

    With `adapter_only` the LoRA adapter's instead: `<layer>.lora_A.weight`, `<layer>.lora_B.weight`. What is handed
    out is whole, and shares the parameters' memory, only until the next bucket is asked for. Tied parameters appear
    once, under the name of the first (transformers ties the head to the embedding).
    """
    bucket: list[_Entry] = []
    for name, parameter in policy.named_parameters():
        if (".lora_" in name) != adapter_only:
            continue
        layer = policy.get_submodule(name.rpartition(_LORA_BASE)[0]) if _LORA_BASE in name else None
        if bucket and sum(full_bytes(entry.parameter) for entry in bucket) + full_bytes(parameter) > bucket_bytes:
            yield from _gathered(bucket)
            bucket = []
        bucket.append(
            _Entry(
                name.replace(_LORA_BASE, ".").replace(".default.", "."),
                parameter,
                layer if name.endswith("weight") else None,
            )
        )
    yield from _gathered(bucket)


class _Entry(NamedTuple):
    name: str
    parameter: nn.Parameter
    lora_layer: Any  # whose adapter is added to the parameter; None: there is none


def _gathered(bucket: list[_Entry]) -> Iterator[dict[str, torch.Tensor]]:
    layers = [entry.lora_layer for entry in bucket if entry.lora_layer is not None]
    adapters = [parameter for layer in layers for name, parameter in layer.named_parameters() if "lora_" in name]
    with whole_parameters([entry.parameter for entry in bucket] + adapters), torch.no_grad():
        yield {entry.name: _merged_weight(entry) for entry in bucket}


def _merged_weight(entry: _Entry) -> torch.Tensor:
    """W₀ + LORA_SCALE · B A without a second buffer of W's size."""
    base, layer = entry.parameter, entry.lora_layer
    if layer is None:
        return base
    a, b = (part["default"].weight.to(base.dtype) for part in (layer.lora_A, layer.lora_B))
    return torch.addmm(base, b, a, alpha=LORA_SCALE)


def full_bytes(parameter: nn.Parameter) -> int:
    """Of the whole parameter, which ZeRO-3 may have partitioned."""
    return getattr(parameter, "ds_numel", parameter.numel()) * parameter.element_size()


def merged(names: Iterable[str], read: Callable[[str], torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of the plain model, from the names in a policy with or without adapters and what `read` gives."""
    for name in names:
        if ".lora_" in name:
            continue
        tensor = read(name)
        if name.endswith(f"{_LORA_BASE}weight"):
            layer = name.removesuffix("base_layer.weight")
            a, b = (read(f"{layer}lora_{part}.default.weight").float() for part in "AB")
            tensor = torch.addmm(tensor.float(), b, a, alpha=LORA_SCALE).to(tensor.dtype)
        yield name.replace(_LORA_BASE, "."), tensor
