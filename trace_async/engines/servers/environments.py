"""Find the engines' own Python environments. scripts/setup_engines.sh makes them and follows the same rule."""

import os
from pathlib import Path

from trace_async.config import ConfigError

FOLDER_VARIABLE = "TRACE_ASYNC_ENGINES"


def engines_folder() -> Path:
    """Return `$TRACE_ASYNC_ENGINES`, or `.venvs` of the checkout that this code lies in, or the user's cache."""
    if named := os.environ.get(FOLDER_VARIABLE):
        return Path(named).expanduser().absolute()
    if checkout := find_checkout():
        return checkout / ".venvs"
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "trace_async" / "engines"


def find_checkout() -> Path | None:
    """Return the checkout that this code lies in, or None when it was installed.

    A checkout is known by files that stand side by side only there.
    """
    landmarks = ("pyproject.toml", "scripts/setup_engines.sh", "trace_async")
    folders = Path(__file__).resolve().parents
    return next((folder for folder in folders if all((folder / name).exists() for name in landmarks)), None)


def engine_python(backend: str, configured: str) -> str:
    """Return the interpreter of an engine's own environment.

    Raises ConfigError when there is none; it names the command that builds it.
    """
    python = Path(configured) if configured else engines_folder() / backend / "bin" / "python"
    if not python.is_file():
        command = (
            f"`bash scripts/setup_engines.sh {backend}`"
            if find_checkout()
            else f"`trace-async setup-engines {backend}`"
        )
        raise ConfigError(
            f"engine.python={configured or python}: not found; run {command}, set {FOLDER_VARIABLE} to the folder "
            f"that holds {backend}/, or set engine.python to an interpreter that has {backend}"
        )
    return str(python)
