"""Load what both worlds need: an optional package, and Java on the machine."""

import importlib
import shutil
from types import ModuleType

from trace_async.config import ConfigError


def load_package(name: str, requirement: str) -> ModuleType:
    """Import the package. Raises ConfigError saying what to install where it, or Java, is missing."""
    if shutil.which("java") is None:
        raise ConfigError(
            f"env: {requirement} runs on Java, and there is no java on the path: "
            "apt-get install openjdk-17-jre-headless"
        )
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"env: {requirement} is not installed ({error}): pip install 'trace-async[worlds]'"
        ) from error
