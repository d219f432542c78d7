"""Train several domains together: one policy, one predictor, tasks from each domain by its weight.

`Task.domain` says which domain a task belongs to, and figures are given per domain. A small policy for the mix knows
the words of all.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from random import Random
from typing import Any

from envs import load_domain
from envs.lazy_tasks import LazyTasks
from trace_async.config import ConfigError, EnvConfig
from trace_async.env import DemonstrationSource, Demonstrator, Domain, Env
from trace_async.types import Split, Task

DEFAULT_DOMAINS: Mapping[str, Mapping[str, Any]] = {"multihop": {}, "math": {}, "functions": {}}


class Mixed:
    """Holds domains as one.

    `domains`: name (as in `env.name`) → `weight` (1) and `args` of that domain. A split ends where the first domain has
    no more tasks, and any stretch of it holds the domains by weight.
    """

    name = "mixed"

    def __init__(self, *, domains: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        self._domains: dict[str, Domain] = {}
        self._weights: dict[str, float] = {}
        for name, settings in (domains or DEFAULT_DOMAINS).items():
            unknown = set(settings) - {"weight", "args"}
            if unknown:
                raise ConfigError(f"env.args.domains.{name}: unknown {sorted(unknown)}; it takes weight and args")
            weight = float(settings.get("weight", 1.0))
            if not weight > 0:
                raise ConfigError(f"env.args.domains.{name}.weight={weight}: must be > 0")
            domain = load_domain(EnvConfig(name=name, args=dict(settings.get("args", {}))))
            if domain.name in self._domains or isinstance(domain, Mixed):
                raise ConfigError(f"env.args.domains.{name}: a mix holds each domain once, and no other mix")
            self._domains[domain.name], self._weights[domain.name] = domain, weight
        self.in_random_order = all(getattr(domain, "in_random_order", False) for domain in self._domains.values())
        self.blocking = any(getattr(domain, "blocking", False) for domain in self._domains.values())
        self._tasks: dict[Split, LazyTasks] = {}

    def tasks(self, split: Split) -> Sequence[Task]:
        if split not in self._tasks:
            self._tasks[split] = _by_weight(
                {name: domain.tasks(split) for name, domain in self._domains.items()}, self._weights
            )
        return self._tasks[split]

    def demonstration_tasks(self) -> Sequence[Task]:
        """Return what each domain wants demonstrated, by weight."""
        shown = {
            name: domain.demonstration_tasks() if isinstance(domain, DemonstrationSource) else domain.tasks("train")
            for name, domain in self._domains.items()
        }
        return _by_weight(shown, self._weights)

    def make_env(self, task: Task) -> Env:
        return self._domain_of(task).make_env(_own(task))

    def demonstrate(self, task: Task, rng: Random) -> Sequence[str]:
        return self._demonstrator(task.domain).demonstrate(_own(task), rng)

    def vocabulary(self) -> Sequence[str]:
        words = (word for name in self._domains for word in self._demonstrator(name).vocabulary())
        return list(dict.fromkeys(words))

    async def close(self) -> None:
        """Close the domains that can be closed."""
        for domain in self._domains.values():
            close = getattr(domain, "close", None)
            if close is not None:
                await close()

    def _domain_of(self, task: Task) -> Domain:
        if task.domain not in self._domains:
            raise ValueError(f"task {task.id}: the mix has no domain {task.domain}; it has {', '.join(self._domains)}")
        return self._domains[task.domain]

    def _demonstrator(self, name: str) -> Demonstrator:
        domain = self._domains[name]
        if not isinstance(domain, Demonstrator):
            raise ConfigError(f"env.args.domains: {name} has no demonstrations: set policy.path to a model")
        return domain


def _own(task: Task) -> Task:
    """Return the task as its own domain made it."""
    return replace(task, id=task.id.removeprefix(f"{task.domain}/"))


def _by_weight(tasks: Mapping[str, Sequence[Task]], weights: Mapping[str, float]) -> LazyTasks:
    """Return tasks of all domains, each from the one that is furthest behind its weight, until that has no more."""
    places: list[tuple[str, int]] = []
    sizes = {name: len(of_domain) for name, of_domain in tasks.items()}
    taken = dict.fromkeys(tasks, 0)
    while True:
        name = min(tasks, key=lambda name: (taken[name] + 1) / weights[name])
        if taken[name] == sizes[name]:
            break
        places.append((name, taken[name]))
        taken[name] += 1

    def make(index: int) -> Task:
        name, place = places[index]
        task = tasks[name][place]
        return replace(task, domain=name, id=f"{name}/{task.id}")

    return LazyTasks(len(places), make)
