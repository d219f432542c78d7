"""Save a learner in a checkpoint and load it, as full fp32 tensors by name.

So a checkpoint does not depend on the ZeRO stage or the number of ranks that wrote it.

learner/
  learner.json              optimizer steps, LoRA rank, the shards
  tensors-0000.safetensors  "value/<name>", "exp_avg/<name>", "exp_avg_sq/<name>", about a gigabyte a file; every rank
                            writes some of the files
  policy/                   config.json, tokenizer, …: all of the start policy's folder but its weights
"""

import contextlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from trace_async.learner.deepspeed import (
    ADAM_STATE,
    read_adam_steps,
    read_training_state,
    whole_parameters,
    write_adam_steps,
    write_training_state,
)
from trace_async.learner.learner import Learner
from trace_async.learner.policy_tensors import full_bytes, merged, policy_buckets
from trace_async.policy.save import ORIGIN_FILE
from trace_async.run.checkpoint import CheckpointError

SHARD_BYTES = 1 << 30
EXPORT_BYTES = 4 << 30
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_WEIGHT_FILES = (".safetensors", ".safetensors.index.json", ".bin", ".pt", ".gguf")


class Shard(NamedTuple):
    """A file of a checkpoint."""

    rank: int
    """The rank that writes it."""
    names: list[str]
    """The parameters in it."""


def plan_shards(num_bytes: Mapping[str, int], num_ranks: int) -> list[Shard]:
    """Deal the parameters (name → bytes with optimizer state) out to the ranks, in their order.

    A parameter goes to the rank that has least so far. A rank begins a new file when its last one has SHARD_BYTES.
    The plan is the same on all ranks, because it depends on nothing else.
    """
    shards: list[Shard] = []
    total, in_file = [0] * num_ranks, [0] * num_ranks
    latest: dict[int, Shard] = {}
    for name, size in num_bytes.items():
        rank = total.index(min(total))
        if rank not in latest or in_file[rank] >= SHARD_BYTES:
            latest[rank] = Shard(rank, [])
            shards.append(latest[rank])
            in_file[rank] = 0
        latest[rank].names.append(name)
        total[rank] += size
        in_file[rank] += size
    return shards


def save_learner(learner: Learner, folder: Path) -> None:
    """Write the learner into `folder`, which is made and which all ranks must see. Called on all ranks together.

    Each rank writes its own shards. Raises OSError when the disk of a rank does not take them; even then its peers do
    not wait for it without end.
    """
    shards = plan_shards({n: _bytes_with_state(p) for n, p in learner.policy.named_parameters()}, learner.world_size)
    states = _own_states(learner, shards)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for index, tensors in states:
            _save_tensors(tensors, folder / _shard_name(index))
            del tensors  # one file at a time is in memory
        if learner.is_first:
            _copy_all_but_weights(learner.policy_path, folder / "policy")
            _write_record(learner, len(shards), folder)
    finally:
        for _ in states:
            pass  # gather to the end even after an error, because the other ranks wait in the same collective calls


def _own_states(learner: Learner, shards: list[Shard]) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
    """Yield (index of the shard, its tensors) for the shards of this rank.

    All ranks must iterate to the end, because they gather every parameter together.
    """
    shard_of = {name: index for index, shard in enumerate(shards) for name in shard.names}
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in learner.policy.named_parameters():
        state = _read(learner.engine, parameter)
        index = shard_of[name]
        if shards[index].rank != learner.rank:
            continue
        tensors |= {f"{key}/{name}": tensor.to("cpu", copy=True).contiguous() for key, tensor in state.items()}
        if name == shards[index].names[-1]:
            yield index, tensors
            tensors = {}


def _write_record(learner: Learner, num_shards: int, folder: Path) -> None:
    record = {
        "num_steps": learner.num_steps,
        "adam_steps": read_adam_steps(learner.engine),
        "lora_rank": learner.config.learner.lora_rank,
        "dtype": learner.config.learner.dtype,
        "shards": [_shard_name(index) for index in range(num_shards)],
    }
    (folder / "learner.json").write_text(json.dumps(record, indent=1), encoding="utf-8")


def load_learner(learner: Learner, folder: Path) -> None:
    """Read what `save_learner` wrote. Called on all ranks, of which there may be more or fewer than at the save.

    Raises CheckpointError when the checkpoint is of another model.
    """
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
    """Write the current policy as a Hugging Face folder. Called on all ranks together.

    `target` appears only when it is complete.
    """
    buckets = policy_buckets(learner.policy, learner.config.learner.weight_bucket_bytes)
    try:
        if learner.is_first:
            _write_policy(buckets, learner.policy_path, target)
    finally:
        for _ in buckets:
            pass  # gather to the end even after an error, because the other ranks wait in the same collective calls


def export_checkpoint(folder: Path, target: Path) -> None:
    """Write the policy of a checkpoint's `learner` folder as a Hugging Face folder, LoRA merged.

    This needs no ranks and no DeepSpeed.
    """
    record = _record(folder)
    dtype = _DTYPES[record["dtype"]]
    with contextlib.ExitStack() as stack:
        values: dict[str, Any] = {}  # parameter → the file that has it
        for shard in record["shards"]:
            file = stack.enter_context(_opened(folder / shard))
            values |= {key.removeprefix("value/"): file for key in file.keys() if key.startswith("value/")}  # noqa: SIM118
        tensors = merged(values, lambda name: values[name].get_tensor(f"value/{name}").to(dtype))
        _write_policy(({name: tensor} for name, tensor in tensors), folder / "policy", target)


def _read(engine: Any, parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
    if parameter.requires_grad:
        return read_training_state(engine, parameter)
    with whole_parameters([parameter]):
        return {"value": parameter.detach().clone()}


def _bytes_with_state(parameter: torch.nn.Parameter) -> int:
    numel = getattr(parameter, "ds_numel", parameter.numel())
    return 4 * numel * (1 + len(ADAM_STATE)) if parameter.requires_grad else full_bytes(parameter)


def _shard_name(index: int) -> str:
    return f"tensors-{index:04d}.safetensors"


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
    """Yield (parameter name, its tensors by `value`, `exp_avg` and `exp_avg_sq`), one parameter at a time."""
    for shard in shards:
        with _opened(folder / shard) as file:
            keys = set(file.keys())
            for name in sorted(key.removeprefix("value/") for key in keys if key.startswith("value/")):
                wanted = [key for key in ("value", *ADAM_STATE) if f"{key}/{name}" in keys]
                yield name, {key: file.get_tensor(f"{key}/{name}") for key in wanted}


@contextlib.contextmanager
def _opened(shard: Path) -> Iterator[Any]:
    try:
        with safe_open(shard, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{shard}: cannot be read ({error})") from error


def _write_policy(buckets: Iterable[dict[str, torch.Tensor]], source: Path, target: Path) -> None:
    """Write a Hugging Face folder: one safetensors file, or several and their index.

    At most EXPORT_BYTES of tensors are in memory at a time.
    """
    if target.exists():
        raise ValueError(f"export to {target}: it exists already; name a new folder")
    partial = target.with_name(f".exporting-{target.name}")
    shutil.rmtree(partial, ignore_errors=True)
    _copy_all_but_weights(source, partial)
    weight_map: dict[str, str] = {}
    pending: dict[str, torch.Tensor] = {}

    def write() -> None:
        name = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
        _save_tensors(pending, partial / name)
        weight_map.update(dict.fromkeys(pending, name))
        pending.clear()

    for bucket in buckets:
        if pending and sum(tensor.nbytes for tensor in (pending | bucket).values()) > EXPORT_BYTES:
            write()
        pending.update({name: tensor.detach().to("cpu", copy=True) for name, tensor in bucket.items()})
        del bucket
    write()
    if len(set(weight_map.values())) == 1:
        (partial / "model-00001.safetensors").rename(partial / "model.safetensors")
    else:
        index = {"metadata": {}, "weight_map": weight_map}
        (partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
    partial.rename(target)


def _copy_all_but_weights(source: Path, target: Path) -> None:
    target.mkdir(parents=True)
    for path in source.iterdir():
        # ORIGIN_FILE holds the hashes of the start policy's weights. They would not fit the trained ones.
        if path.is_file() and path.name != ORIGIN_FILE and not path.name.endswith(_WEIGHT_FILES):
            shutil.copyfile(path, target / path.name)
