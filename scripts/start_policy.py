"""Find the policy that a run starts from, or build it."""

from collections.abc import Callable
from pathlib import Path

from trace_async.config import Config, ConfigError
from trace_async.env import Demonstrator


def ensure_policy(config: Config, *, log: Callable[[str], None] = print) -> Path:
    """Return the start policy: `policy.path`, or the small one of the environment, built when it is not cached.

    `log` takes lines about how far it is.
    """
    if config.policy.path:
        return Path(config.policy.path).absolute()
    from envs import load_domain
    from trace_async.policy.warm_start import make_policy

    domain = load_domain(config.env)
    if not isinstance(domain, Demonstrator):
        raise ConfigError(f"policy.path is empty, and {config.env.name} has no demonstrations to build a policy from")
    return make_policy(domain, config.policy, log=log).absolute()
