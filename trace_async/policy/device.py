"""Turn a setting's `auto`, `cpu` or `cuda` into the device that this process computes on."""

import torch

from trace_async.config import ConfigError


def resolve_device(setting: str, *, name: str, rank: int = 0) -> torch.device:
    """Return the device for the setting called `name`. `auto` is CUDA if PyTorch sees a GPU.

    On CUDA a process takes the GPU of its own number, modulo the number of GPUs that it sees. Ray shows an actor only
    the GPUs that it has reserved. Raises ConfigError for `cuda` without a GPU.
    """
    cuda = torch.cuda.is_available()
    if setting == "cuda" and not cuda:
        raise ConfigError(f"{name}=cuda: PyTorch {torch.__version__} sees no GPU; set cpu, or install a build for CUDA")
    return torch.device("cuda", rank % torch.cuda.device_count()) if cuda and setting != "cpu" else torch.device("cpu")
