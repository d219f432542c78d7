"""The domain `agent`: any program that asks an OpenAI-compatible model, trained as it is."""

import importlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from envs.agent.check import check_replay
from envs.agent.endpoint.server import HttpEndpoint
from envs.agent.env import AgentEnv, AgentSettings, FirstRequests
from envs.agent.runners.fork_runner import ForkRunner
from envs.agent.runners.runner import CommandRunner, FunctionRunner, Runner
from envs.agent.session import Session
from envs.agent.verifier import CommandVerifier, FunctionVerifier
from envs.contract.plays import Finding
from envs.lazy_tasks import hold_out
from trace_async.config import ConfigError
from trace_async.run.dataset import read_rows
from trace_async.types import Split, Task

MODEL_ERRORS = (
    *("MaxTurnsExceeded", "ModelBehaviorError"),  # openai-agents
    *("UnexpectedModelBehavior", "UsageLimitExceeded"),  # pydantic-ai
    *("GraphRecursionError",),  # langgraph
    *("AgentMaxStepsError", "AgentParsingError", "AgentToolCallError", "AgentToolExecutionError"),  # smolagents
)
"""What frameworks raise when the model does not do what it should."""


class Agent:
    """The domain that trains one agent as it is, given as a function (`agent`) or as a program (`command`).

    - `agent`: `package.module:function`, a coroutine or a plain function that returns its result. It is called with
      those that it takes of `task` (a dict, one row of the file), `base_url` and `api_key`.
    - `python`: the interpreter of another environment. The function then runs there, in a process forked for each
      rollout, and its module is found from `cwd`.
    - `command`: a program, as a list of words. It finds its model in the environment (OPENAI_BASE_URL …) and its task
      on standard input and in TRACE_TASK, and prints its result.
    - `tasks`: a JSONL file; rows may have an `id` and a `kind`. `heldout`: another one; without it a sample of
      `num_heldout` rows of `tasks` is held out.
    - `verifier`: `package.module:function(task, outcome)` → reward in [0, 1], or a command as a list.
    - `max_turns`: requests in a rollout. `turn_timeout_s`: seconds between an answer and the next request.
    - `max_running`: processes at once.
    - `model_errors`: further names of exceptions that are the model's doing; a rollout that one ends has reward 0.
    - `host`, `advertise`: where the endpoint listens, and by which name agents elsewhere reach it.
    """

    name = "agent"

    def __init__(
        self,
        *,
        tasks: str,
        verifier: str | Sequence[str],
        agent: str = "",
        python: str = "",
        command: Sequence[str] = (),
        cwd: str = "",
        heldout: str = "",
        num_heldout: int = 100,
        max_turns: int = 32,
        turn_timeout_s: float = 120.0,
        verifier_timeout_s: float = 60.0,
        max_running: int = 16,
        model_errors: Sequence[str] = (),
        host: str = "127.0.0.1",
        advertise: str = "",
    ) -> None:
        if bool(agent) == bool(command):
            raise ConfigError("env.args: give either agent (package.module:function) or command (a list)")
        _at_least_one("max_turns", max_turns)
        _at_least_one("max_running", max_running)
        _positive("turn_timeout_s", turn_timeout_s)
        _positive("verifier_timeout_s", verifier_timeout_s)
        self._split = self._read_split(tasks, heldout, num_heldout)
        self._runner: Runner
        if python and not agent:
            raise ConfigError("env.args.python: the interpreter of env.args.agent; a command names its own")
        if python:
            self._runner = ForkRunner(agent, python, cwd, max_running)
        elif agent:
            self._runner = FunctionRunner(load_function("agent", agent))
        else:
            self._runner = CommandRunner(words("command", command), cwd, max_running)
        self._verifier: FunctionVerifier | CommandVerifier
        if isinstance(verifier, str):
            self._verifier = FunctionVerifier(load_function("verifier", verifier), verifier_timeout_s)
        else:
            self._verifier = CommandVerifier(words("verifier", verifier), verifier_timeout_s)
        self._settings = AgentSettings(max_turns=max_turns, model_errors=frozenset([*MODEL_ERRORS, *model_errors]))
        self._timeout_s = turn_timeout_s
        self._endpoint = HttpEndpoint(host, advertise)
        self._first_requests = FirstRequests()

    def _read_split(self, tasks: str, heldout: str, num_heldout: int) -> dict[Split, list[Task]]:
        return read_split(tasks, heldout, num_heldout, self.name)

    def tasks(self, split: Split) -> Sequence[Task]:
        return self._split[split]

    def make_env(self, task: Task) -> AgentEnv:
        def make_session() -> Session:
            return Session(self._endpoint, self._runner, task.data, self._timeout_s)

        return AgentEnv(task, make_session, self._verifier, self._settings, self._first_requests)

    async def check(self, tasks: Sequence[Task]) -> list[Finding]:
        """Check that agents can be replayed; `trace-async env check agent` asks this beside the common contract."""
        return await check_replay(self, tasks)

    async def close(self) -> None:
        """Stop the endpoint and the agents' loop."""
        await self._endpoint.shut_down()
        await self._runner.close()


def load_function(setting: str, target: str) -> Callable[..., Any]:
    """Return the function that `package.module:function` names. Raises ConfigError, which names `setting`."""
    module_name, _, name = target.partition(":")
    try:
        function: Callable[..., Any] = getattr(importlib.import_module(module_name), name)
    except Exception as error:  # the import runs somebody else's code
        raise ConfigError(
            f"env.args.{setting}={target}: cannot be found as package.module:function ({type(error).__name__}: {error})"
        ) from error
    if not callable(function):
        raise ConfigError(f"env.args.{setting}={target}: is not a function")
    return function


def read_tasks(path: str, domain: str) -> list[Task]:
    """Return a task for each row. Raises ValueError naming file and line."""
    tasks = []
    for number, row in enumerate(read_rows(path, {})):
        task_id = row.get("id", f"{Path(path).stem}-{number}")
        tasks.append(Task(id=str(task_id), domain=domain, kind=str(row.get("kind", "task")), data=row))
    if len({task.id for task in tasks}) < len(tasks):
        raise ValueError(f"{path}: two rows have the same id")
    return tasks


def read_split(path: str, heldout_path: str, num_heldout: int, domain: str) -> dict[Split, list[Task]]:
    """Return the tasks of two files, or of one file of which a sample is held out.

    Raises ConfigError when `num_heldout` does not leave both splits a task, and ValueError as `read_tasks` does.
    """
    rows = read_tasks(path, domain)
    if heldout_path:
        return {"train": rows, "heldout": read_tasks(heldout_path, domain)}
    if not 0 < num_heldout < len(rows):
        raise ConfigError(f"env.args.num_heldout={num_heldout}: {path} has {len(rows)} tasks")
    train, heldout = hold_out(rows, num_heldout)
    return {"train": train, "heldout": heldout}


def words(setting: str, command: Sequence[str]) -> list[str]:
    """Return `command` as a list. Raises ConfigError when it is one text, as for a shell, or has no words."""
    if isinstance(command, str) or not command or not all(isinstance(word, str) and word for word in command):
        raise ConfigError(f"env.args.{setting}={command!r}: a list of words, such as [python, my_agent.py]")
    return list(command)


def _at_least_one(setting: str, value: int) -> None:
    if not isinstance(value, int) or value < 1:
        raise ConfigError(f"env.args.{setting}={value}: must be ≥ 1")


def _positive(setting: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ConfigError(f"env.args.{setting}={value}: must be > 0")
