"""Give the policy's tensors by their Hugging Face names, whatever trains them.

Tensors that ZeRO-3 partitions are gathered in buckets, and LoRA is merged.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from trace_async.learner.deepspeed import whole_parameters

LORA_SCALE = 2
_LORA_BASE = ".base_layer."


def add_lora(policy: Any, rank: int, *, seed: int) -> None:
    """Inject LoRA adapters (arXiv 2106.09685) into every linear layer but the head. From then on only they train.

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
    """Yield the plain model's tensors by name, at most `bucket_bytes` at a time (or one tensor that is larger).

    All ranks must iterate together. A bucket is valid only until the next one is asked for: until then its tensors are
    whole and share the parameters' memory. Tied parameters appear once, under the first name (transformers ties the
    head to the embedding). With `adapter_only` the tensors are the LoRA adapter's instead:
    `<layer>.lora_A.weight` and `<layer>.lora_B.weight`.
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
    lora_layer: Any
    """The layer whose adapter is added to the parameter (None: there is none)."""


def _gathered(bucket: list[_Entry]) -> Iterator[dict[str, torch.Tensor]]:
    layers = [entry.lora_layer for entry in bucket if entry.lora_layer is not None]
    adapters = [parameter for layer in layers for name, parameter in layer.named_parameters() if "lora_" in name]
    with whole_parameters([entry.parameter for entry in bucket] + adapters), torch.no_grad():
        yield {entry.name: _merged_weight(entry) for entry in bucket}


def _merged_weight(entry: _Entry) -> torch.Tensor:
    """Return W₀ + LORA_SCALE · B A, without a second buffer of W's size."""
    base, layer = entry.parameter, entry.lora_layer
    if layer is None:
        return base
    a, b = (part["default"].weight.to(base.dtype) for part in (layer.lora_A, layer.lora_B))
    return torch.addmm(base, b, a, alpha=LORA_SCALE)


def full_bytes(parameter: nn.Parameter) -> int:
    """Return the bytes of the whole parameter, even if ZeRO-3 has partitioned it."""
    return getattr(parameter, "ds_numel", parameter.numel()) * parameter.element_size()


def merged(names: Iterable[str], read: Callable[[str], torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) of the plain model.

    `names` are those of a policy with or without adapters, and `read` gives the tensor of a name.
    """
    for name in names:
        if ".lora_" in name:
            continue
        tensor = read(name)
        if name.endswith(f"{_LORA_BASE}weight"):
            layer = name.removesuffix("base_layer.weight")
            a, b = (read(f"{layer}lora_{part}.default.weight").float() for part in "AB")
            tensor = torch.addmm(tensor.float(), b, a, alpha=LORA_SCALE).to(tensor.dtype)
        yield name.replace(_LORA_BASE, "."), tensor
