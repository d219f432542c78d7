"""Keep everything that is particular to DeepSpeed in one place.

This is how a rank starts quietly, its configuration, and access to whole tensors. ZeRO stages keep parameters and
optimizer state in different places. Here both are read and written as full fp32 tensors by name, so that weights and
checkpoints know nothing of stages and numbers of ranks. DeepSpeed takes seconds to import, so only functions import it.
"""

import contextlib
import logging
import math
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import nn

from trace_async.config import ConfigError, LearnerConfig

ADAM_STATE = ("exp_avg", "exp_avg_sq")
# Settings that the learner itself sets; `learner.deepspeed` may not contradict them.
_OWN_OPTIONS = frozenset(
    {"bf16", "fp16", "gradient_accumulation_steps", "managed_gradient_accumulation", "optimizer", "scheduler"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankAddress:
    """The place of this process among the learner's ranks, and where they meet. A lone rank meets nobody."""

    rank: int = 0
    """Its number, from 0."""
    world_size: int = 1
    """How many ranks there are."""
    host: str = ""
    """The address at which rank 0 waits for the others."""
    port: int = 0
    """The port there."""
    listener: int | None = None
    """Of rank 0: the file descriptor of a socket that listens there. `store` takes it and closes it in the end."""

    def environment(self, device: torch.device) -> dict[str, str]:
        """Return the environment variables that DeepSpeed reads.

        DeepSpeed computes on the CUDA device with the number LOCAL_RANK among those that the process sees. Ray shows
        each rank only its own device, as number 0. So LOCAL_RANK is the device's number and not the rank's.
        """
        return {
            "RANK": str(self.rank),
            "LOCAL_RANK": str(device.index or 0),
            "WORLD_SIZE": str(self.world_size),
        }

    def store(self, timeout: timedelta) -> torch.distributed.Store:
        """Return the store in which the ranks find each other. Waits until rank 0 is there.

        Rank 0 serves it from a socket that has listened since the port was chosen. A port that was only found free
        could be taken by another process before the store listens.
        """
        if self.world_size == 1:
            return torch.distributed.HashStore()
        return torch.distributed.TCPStore(
            self.host,
            self.port,
            self.world_size,
            is_master=self.rank == 0,
            timeout=timeout,
            wait_for_workers=False,
            master_listen_fd=self.listener,
        )


@contextlib.contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """Send what DeepSpeed logs and prints to stderr, because stdout belongs to the user."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def join_ranks(address: RankAddress, device: torch.device, timeout_s: float) -> None:
    """Start torch.distributed and let DeepSpeed use it, with gloo on the CPU and nccl on CUDA.

    Waits at most `timeout_s`. A process that has joined stays joined, and a second call does nothing.
    """
    os.environ.update(address.environment(device))
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    backend = "gloo" if device.type == "cpu" else "nccl"
    timeout = timedelta(seconds=timeout_s)
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group(
            backend,
            store=address.store(timeout),
            rank=address.rank,
            world_size=address.world_size,
            timeout=timeout,
            # As DeepSpeed itself does; a lone rank has no peer, and torch would split a communicator for every group.
            device_id=device if device.type == "cuda" and address.world_size > 1 else None,
        )
    with stdout_to_stderr():
        import deepspeed
        import deepspeed.ops
        from deepspeed.ops.op_builder.all_ops import ALL_OPS

        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        if device.type == "cpu":
            # Otherwise DeepSpeed tries the compiler on all its ops, and spends half a minute on building a
            # shared-memory all-reduce.
            deepspeed.ops.__compatible_ops__ = dict.fromkeys(ALL_OPS, False)
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, timeout=timeout, verbose=False)


def leave_ranks() -> None:
    """Break the connections to the other ranks. This process cannot be a rank again."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def deepspeed_options(config: LearnerConfig) -> dict[str, Any]:
    """Return DeepSpeed's configuration: our own, with `learner.deepspeed` merged over it.

    Raises ConfigError when `learner.deepspeed` sets what the learner sets itself.
    """
    taken = sorted(_OWN_OPTIONS & config.deepspeed.keys())
    if taken:
        raise ConfigError(f"learner.deepspeed={taken}: set by the learner itself; use its own settings")
    own: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": 0.0 if _is_plain(config) else config.max_grad_norm,
        "bf16": {"enabled": config.dtype == "bfloat16"},
        "zero_optimization": {"stage": config.zero_stage},
        # Allow torch's own AdamW with CPU offload, so that the compiled DeepSpeedCPUAdam is not required.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    return _merged(own, config.deepspeed)


class _ZeroThree:
    """Answers what transformers asks of the DeepSpeed configuration in force."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.config = options

    def is_zero3(self) -> bool:
        return True


@contextlib.contextmanager
def partitioned_loading(config: LearnerConfig) -> Iterator[None]:
    """Let a model that transformers loads inside the block be partitioned as it is built (ZeRO-3 only).

    All ranks load together. Each then holds its share and at most one whole module, and only rank 0 maps the files
    into memory. Without this, every rank would have to hold the whole model first.
    """
    if config.zero_stage != 3:
        yield
        return
    from transformers.integrations import deepspeed as in_transformers

    in_force = _ZeroThree(deepspeed_options(config))  # transformers only keeps a weak reference
    in_transformers.set_hf_deepspeed_config(in_force)
    try:
        with stdout_to_stderr():
            yield
    finally:
        in_transformers.unset_hf_deepspeed_config()


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in over.items():
        below = result.get(key)
        result[key] = _merged(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return result


def make_deepspeed(module: nn.Module, optimizer: torch.optim.Optimizer, config: LearnerConfig) -> Any:
    """Wrap `module` in a DeepSpeed engine. All that is called in training must happen in the module's forward."""
    if _is_plain(config):
        _clip_before_step(optimizer, config.max_grad_norm)
    with stdout_to_stderr():
        import deepspeed

        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=deepspeed_options(config))
    _start_adam_state(engine)
    return engine


def make_frozen(module: nn.Module, config: LearnerConfig) -> Any:
    """Wrap a module without gradients whose parameters are partitioned (ZeRO-3).

    The engine gathers each parameter when the forward comes to it, so all ranks must call it equally often.
    """
    with stdout_to_stderr():
        import deepspeed

        engine, *_ = deepspeed.initialize(model=module, config=deepspeed_options(config))
    engine.eval()
    return engine


def _start_adam_state(engine: Any) -> None:
    """Create AdamW's state at step 0, so that a checkpoint can be read or written before the first step."""
    # The name of the optimizer's flat fp32 partitions depends on the ZeRO stage.
    holders = ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat", "fp32_groups_flat_partition")
    for partition in next((getattr(engine.optimizer, h) for h in holders if hasattr(engine.optimizer, h)), []):
        moments = {key: torch.zeros_like(partition) for key in ADAM_STATE}
        _adam(engine).state[partition] = {"step": torch.tensor(0.0), **moments}
    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def _is_plain(config: LearnerConfig) -> bool:
    """Whether this is ZeRO 0 in fp32: DeepSpeed then steps our optimizer as it is and reports no gradient norm."""
    return config.zero_stage == 0 and config.dtype == "float32"


def _clip_before_step(optimizer: torch.optim.Optimizer, max_norm: float) -> None:
    def clip(adam: Any, _args: Any, _kwargs: Any) -> None:
        parameters = [parameter for group in adam.param_groups for parameter in group["params"]]
        # DeepSpeed's get_global_grad_norm reads this attribute.
        norm = adam._global_grad_norm = nn.utils.clip_grad_norm_(parameters, max_norm or math.inf)
        if not torch.isfinite(norm):
            adam.zero_grad(set_to_none=True)  # AdamW passes over a parameter without a gradient, its state included

    optimizer.register_step_pre_hook(clip)


def step_if_finite(engine: Any) -> float:
    """Take an optimizer step, unless a gradient is not finite on any rank; then weights and optimizer stay as they are.

    Returns the gradient norm before clipping; one that is not finite says that no step was taken. DeepSpeed's own
    optimizers (ZeRO 1–3, bf16) leave such a step out by themselves.
    """
    engine.step()
    return float(engine.get_global_grad_norm() or 0.0) if engine.was_step_applied() else math.inf


@contextlib.contextmanager
def whole_parameters(parameters: Sequence[nn.Parameter], *, write: bool = False) -> Iterator[None]:
    """Make these parameters whole on every rank inside the block, even if ZeRO-3 partitions them.

    With `write`, the changes that rank 0 makes are scattered to all ranks at the end.
    """
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=0 if write else None):
        yield


def read_training_state(engine: Any, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
    """Return a parameter's `value` and, if the optimizer has them, `exp_avg` and `exp_avg_sq`, as full fp32 tensors.

    Called on all ranks together.
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if not _is_partitioned(parameter):
        state = engine.optimizer.state.get(parameter, {})
        found = {"value": parameter.detach().float()}
        return found | {key: state[key].float() for key in ADAM_STATE if key in state}
    found = {"value": safe_get_full_fp32_param(parameter)}
    for key in ADAM_STATE:
        found[key] = safe_get_full_optimizer_state(parameter, key)
    return {key: tensor.view(_full_shape(parameter)) for key, tensor in found.items()}


def write_training_state(engine: Any, parameter: nn.Parameter, state: Mapping[str, torch.Tensor]) -> None:
    """Write what `read_training_state` returned. Called on all ranks with the same full tensors."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    with whole_parameters([parameter], write=True), torch.no_grad():
        parameter.copy_(state["value"])
    if not _is_partitioned(parameter):
        if ADAM_STATE[0] in state:
            adam = engine.optimizer.state[parameter]
            for key in ADAM_STATE:
                adam[key] = state[key].to(parameter.device, parameter.dtype, copy=True)
        return
    device = parameter.device
    safe_set_full_fp32_param(parameter, state["value"].to(device))
    for key in ADAM_STATE:
        if key in state:
            safe_set_full_optimizer_state(parameter, state[key].to(device), key)


def read_adam_steps(engine: Any) -> float:
    """Return the number of optimizer steps that AdamW has counted (0 before the first)."""
    steps = [float(state["step"]) for state in _adam(engine).state.values() if "step" in state]
    return max(steps, default=0.0)


def write_adam_steps(engine: Any, steps: float) -> None:
    """Set AdamW's step count. Its bias correction depends on it."""
    for state in _adam(engine).state.values():
        if state:
            state["step"] = torch.tensor(steps, dtype=torch.float32)


def _adam(engine: Any) -> torch.optim.Optimizer:
    optimizer = engine.optimizer
    return optimizer if isinstance(optimizer, torch.optim.Optimizer) else optimizer.optimizer


def _is_partitioned(parameter: nn.Parameter) -> bool:
    """Whether DeepSpeed keeps an fp32 copy of its own (ZeRO 1–3, bf16)."""
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")


def _full_shape(parameter: nn.Parameter) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)
