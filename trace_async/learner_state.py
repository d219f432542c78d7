"""A learner in a checkpoint: full fp32 tensors by name, whatever ZeRO stage and number of ranks wrote or reads them.

learner/
  learner.json              optimizer steps, LoRA rank, the shards
  tensors-0000.safetensors  "value/<name>", "exp_avg/<name>", "exp_avg_sq/<name>", about a gigabyte a file
  policy/                   config.json, tokenizer, …: all of the start policy's folder but its weights
"""

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from trace_async.checkpoint import CheckpointError
from trace_async.deepspeed_engine import (
    ADAM_STATE,
    read_adam_steps,
    read_training_state,
    whole_parameters,
    write_adam_steps,
    write_training_state,
)
from trace_async.learner import Learner
from trace_async.policy_weights import merged, policy_buckets

SHARD_BYTES = 1 << 30
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_WEIGHT_FILES = (".safetensors", ".safetensors.index.json", ".bin", ".pt", ".gguf")


def save_learner(learner: Learner, folder: Path) -> None:
    """Called on all ranks; rank 0 writes into `folder` (made). OSError when the disk does not take it."""
    if learner.is_first:
        folder.mkdir(parents=True, exist_ok=True)
        _copy_all_but_weights(learner.policy_path, folder / "policy")
    shards: list[str] = []
    shard: dict[str, torch.Tensor] = {}
    for name, parameter in learner.policy.named_parameters():
        state = _read(learner.engine, parameter)
        if not learner.is_first:
            continue
        shard |= {f"{key}/{name}": tensor.to("cpu", copy=True).contiguous() for key, tensor in state.items()}
        if sum(tensor.nbytes for tensor in shard.values()) >= SHARD_BYTES:
            shards.append(_write_shard(folder, len(shards), shard))
            shard = {}
    if not learner.is_first:
        return
    if shard:
        shards.append(_write_shard(folder, len(shards), shard))
    record = {
        "num_steps": learner.num_steps,
        "adam_steps": read_adam_steps(learner.engine),
        "lora_rank": learner.config.learner.lora_rank,
        "dtype": learner.config.learner.dtype,
        "shards": shards,
    }
    (folder / "learner.json").write_text(json.dumps(record, indent=1), encoding="utf-8")


def load_learner(learner: Learner, folder: Path) -> None:
    """The inverse, called on all ranks, of which there may be more or fewer than at the save. CheckpointError when the
    checkpoint is of another model."""
    record = _record(folder)
    parameters = dict(learner.policy.named_parameters())
    missing = set(parameters)
    for name, state in _tensors(folder, record["shards"]):
        parameter = parameters.get(name)
        shape = getattr(parameter, "ds_shape", None) or getattr(parameter, "shape", None)
        if parameter is None or tuple(shape or ()) != tuple(state["value"].shape):
            raise CheckpointError(
                f"{folder}: tensor {name} {tuple(state['value'].shape)} does not fit this policy; resume with the "
                "same policy.path and learner.lora_rank"
            )
        if parameter.requires_grad:
            write_training_state(learner.engine, parameter, state)
        else:
            with whole_parameters([parameter], write=True), torch.no_grad():
                parameter.copy_(state["value"])
        missing.discard(name)
    if missing:
        raise CheckpointError(f"{folder}: tensors {sorted(missing)[:3]} … are not in the checkpoint")
    write_adam_steps(learner.engine, record["adam_steps"])
    learner.num_steps = record["num_steps"]


def export_learner(learner: Learner, target: Path) -> None:
    """The current policy as a Hugging Face folder, called on all ranks; `target` appears only when it is whole."""
    tensors: dict[str, torch.Tensor] = {}
    for bucket in policy_buckets(learner.policy, learner.config.learner.weight_bucket_bytes):
        if learner.is_first:
            tensors |= {name: tensor.detach().to("cpu", copy=True) for name, tensor in bucket.items()}
    if learner.is_first:
        _write_policy(tensors, learner.policy_path, target)


def export_checkpoint(folder: Path, target: Path) -> None:
    """The policy of a checkpoint's `learner` folder as a Hugging Face folder, LoRA merged; needs no ranks."""
    record = _record(folder)
    dtype = _DTYPES[record["dtype"]]
    values = {name: state["value"].to(dtype) for name, state in _tensors(folder, record["shards"])}
    _write_policy(merged(values), folder / "policy", target)


def _read(engine: Any, parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
    if parameter.requires_grad:
        return read_training_state(engine, parameter)
    with whole_parameters([parameter]):
        return {"value": parameter.detach().clone()}


def _write_shard(folder: Path, index: int, shard: dict[str, torch.Tensor]) -> str:
    name = f"tensors-{index:04d}.safetensors"
    _save_tensors(shard, folder / name)
    return name


def _save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error


def _record(folder: Path) -> Any:
    try:
        return json.loads((folder / "learner.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{folder}: no learner can be read there ({error})") from error


def _tensors(folder: Path, shards: Iterable[str]) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """(parameter name, its tensors by `value`, `exp_avg`, `exp_avg_sq`), a shard at a time."""
    for shard in shards:
        try:
            with safe_open(folder / shard, framework="pt") as file:
                keys = set(file.keys())
                for name in sorted(key.removeprefix("value/") for key in keys if key.startswith("value/")):
                    wanted = [key for key in ("value", *ADAM_STATE) if f"{key}/{name}" in keys]
                    yield name, {key: file.get_tensor(f"{key}/{name}") for key in wanted}
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{folder / shard}: cannot be read ({error})") from error


def _write_policy(tensors: dict[str, torch.Tensor], source: Path, target: Path) -> None:
    if target.exists():
        raise ValueError(f"export to {target}: it exists already; name a new folder")
    partial = target.with_name(f".exporting-{target.name}")
    shutil.rmtree(partial, ignore_errors=True)
    _copy_all_but_weights(source, partial)
    _save_tensors(tensors, partial / "model.safetensors")
    partial.rename(target)


def _copy_all_but_weights(source: Path, target: Path) -> None:
    target.mkdir(parents=True)
    for path in source.iterdir():
        if path.is_file() and not path.name.endswith(_WEIGHT_FILES):
            shutil.copyfile(path, target / path.name)
