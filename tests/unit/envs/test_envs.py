"""Domains found by name."""

import pytest

from envs import BUILT_IN, load_domain
from trace_async.config import ConfigError, EnvConfig
from trace_async.env import Demonstrator


class OwnDomain:
    name = "own"

    def __init__(self, size: int = 1) -> None:
        if size < 0:
            raise ValueError("env.args.size must be ≥ 0")
        self.size = size


def test_built_in_and_own_domains_are_built_with_their_args() -> None:
    assert isinstance(load_domain(EnvConfig(name="multihop", args={"num_train_worlds": 3})), Demonstrator)
    own = load_domain(EnvConfig(name=f"{__name__}:OwnDomain", args={"size": 4}))
    assert type(own).__name__ == "OwnDomain"
    assert own.size == 4  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("multihopp", {}, "no such environment; did you mean multihop. Built in: multihop, qa_files, math"),
        ("zzz", {}, "no such environment"),
        ("no.such.module:Class", {}, "cannot import no.such.module"),
        ("envs.multihop.domain:Nothing", {}, "module envs.multihop.domain has no Nothing"),
        ("multihop", {"wordls": 3}, "unexpected keyword argument 'wordls'; MultiHop takes .*num_train_worlds"),
    ],
)
def test_mistakes_are_explained(name: str, args: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_domain(EnvConfig(name=name, args=args))


def test_a_domain_says_itself_what_is_wrong_with_a_value() -> None:
    with pytest.raises(ValueError, match=r"mix\.middle-9hop: no such kind"):
        load_domain(EnvConfig(name="multihop", args={"mix": {"middle-9hop": 1.0}}))


def test_every_built_in_name_is_a_module_and_class() -> None:
    assert all(target.count(":") == 1 and target.startswith("envs.") for target in BUILT_IN.values())
