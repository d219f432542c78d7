"""BFCL v4 multi-turn function calling, with the services and the state comparison of the official `bfcl-eval` package.

Install it beside trace-async without its dependencies (28, of which this part needs none that is not here already; its
pin numpy==1.26.4 contradicts ours): `pip install --no-deps bfcl-eval==2026.3.23`. It brings the tasks along.

The official executor evaluates the model's text as Python. Here no text is evaluated: calls come as JSON, a call's name
is looked up in the task's tool documents, and its arguments are bounded before the service's method is called.
"""

import ast
import copy
import importlib
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import cast

from envs.actions import ToolCall
from envs.functions.domain import INSTRUCTIONS, ConversationEnv
from envs.lazy_tasks import hold_out
from trace_async.config import ConfigError
from trace_async.run.dataset import read_rows
from trace_async.types import Json, Message, Prompt, Split, Task

_HOW_TO_INSTALL = "install it with: pip install --no-deps bfcl-eval==2026.3.23"
_MAX_NUMBER = 1e9
_MAX_BY_NAME: Mapping[str, float] = {"precision": 1000, "exponent": 1000}
_JSON_TYPES = {"dict": "object", "float": "number", "tuple": "array", "list": "array", "any": "string"}

_Doc = dict[str, Json]


class BfclBackend:
    """The services of one task, twice: as the model's calls and as the right calls leave them.

    As in the official checker, after each request both must be equal, and the results of the right calls of this
    request must be among the results of the model's calls so far.
    """

    def __init__(self, task: Task) -> None:
        self._answers = cast(list[list[str]], task.data["ground_truth"])
        self.docs = _tool_docs(tuple(cast(list[str], task.data["involved_classes"])))
        self._excluded = frozenset(cast(list[str], task.data["excluded"]))
        self._model = _make_services(task)
        self._truth = _make_services(task)
        self._results: list[str] = []
        self._calls_in_request = 0
        self._request = 0
        self._right = True

    def schemas(self) -> list[Mapping[str, Json]]:
        return [_schema(doc) for name, (_, doc) in self.docs.items() if name not in self._excluded]

    def call(self, call: ToolCall) -> str:
        self._calls_in_request += 1
        if call.name in self._excluded or call.name not in self.docs:
            result = f"Error during execution: there is no tool {call.name[:100]!r}"
        else:
            result = self._execute(self._model, call)
        self._results.append(result)
        return result

    def end_request(self) -> bool:
        """False when the task can no longer succeed."""
        wanted = [
            self._execute(self._truth, parse_python_call(text, self.docs)) for text in self._answers[self._request]
        ]
        self._request += 1
        if wanted:
            checker = _official("eval_checker.multi_turn_eval.multi_turn_checker")
            same_state = checker.state_checker(self._model, self._truth)["valid"]
            all_results = checker.response_checker(self._results, wanted, self._request - 1)["valid"]
            self._right = self._right and self._calls_in_request > 0 and same_state and all_results
        self._calls_in_request = 0
        return self._right

    def is_success(self) -> bool:
        return self._right and self._request == len(self._answers)

    def fork(self) -> "BfclBackend":
        twin = copy.copy(self)
        twin._model, twin._truth = copy.deepcopy((self._model, self._truth))
        twin._results = [*self._results]
        return twin

    def _execute(self, services: Mapping[str, object], call: ToolCall) -> str:
        class_name, _ = self.docs[call.name]
        problem = _too_large(call.arguments)
        if problem:
            return f"Error during execution: {problem}"
        try:
            result = getattr(services[class_name], call.name)(**call.arguments)
        except Exception as error:  # noqa: BLE001  what foreign code makes of the model's arguments is its answer
            return f"Error during execution: {error}"
        if isinstance(result, str):
            return result
        try:
            return json.dumps(result) if isinstance(result, dict) else str(result)
        except TypeError:  # a service's own object inside
            return str(result)


class Bfcl:
    """The BFCL v4 multi-turn tasks. `path`, `answers_path`: other files of that format (empty: those of the package).

    A sample of `num_heldout` tasks is held out.
    """

    name = "bfcl"

    def __init__(
        self,
        *,
        path: str = "",
        answers_path: str = "",
        num_heldout: int = 40,
        max_turns: int = 60,
        max_observation_chars: int = 4000,
    ) -> None:
        data = Path(str(_official("").__file__)).parent / "data"
        self._max_turns = max_turns
        self._max_observation_chars = max_observation_chars
        tasks = load_bfcl(
            path or data / "BFCL_v4_multi_turn_base.json",
            answers_path or data / "possible_answer" / "BFCL_v4_multi_turn_base.json",
        )
        if not 0 < num_heldout < len(tasks):
            raise ConfigError(f"env.args.num_heldout={num_heldout}: there are {len(tasks)} tasks")
        train, heldout = hold_out(tasks, num_heldout)
        self._tasks: dict[Split, list[Task]] = {"train": train, "heldout": heldout}

    def tasks(self, split: Split) -> Sequence[Task]:
        return self._tasks[split]

    def make_env(self, task: Task) -> ConversationEnv:
        backend = BfclBackend(task)
        first, *later = cast(list[str], task.data["requests"])
        messages = (Message(role="system", content=INSTRUCTIONS), Message(role="user", content=first))
        return ConversationEnv(
            Prompt(messages=messages, tools=tuple(backend.schemas())),
            later,
            backend,
            max_turns=self._max_turns,
            max_observation_chars=self._max_observation_chars,
        )


def load_bfcl(path: str | Path, answers_path: str | Path) -> list[Task]:
    """Tasks with their right calls. Raises ValueError naming file and line."""
    rows = read_rows(path, {"id": str, "question": list, "initial_config": dict, "involved_classes": list})
    answers = {str(row["id"]): row for row in read_rows(answers_path, {"id": str, "ground_truth": list})}
    tasks = []
    for row in rows:
        task_id = str(row["id"])
        if task_id not in answers:
            raise ValueError(f"{answers_path}: no ground truth for {task_id} of {path}")
        requests: list[Json] = [
            "\n".join(str(message["content"]) for message in turn)
            for turn in cast(list[list[dict[str, Json]]], row["question"])
        ]
        ground_truth = cast(list[Json], answers[task_id]["ground_truth"])
        if len(ground_truth) != len(requests):
            raise ValueError(f"{answers_path}: {task_id} has {len(ground_truth)} turns, its question {len(requests)}")
        data: dict[str, Json] = {
            "requests": requests,
            "ground_truth": ground_truth,
            "initial_config": row["initial_config"],
            "involved_classes": row["involved_classes"],
            "excluded": row.get("excluded_function", []),
        }
        kind = "+".join(sorted(cast(list[str], row["involved_classes"])))
        tasks.append(Task(id=task_id, domain=Bfcl.name, kind=kind, data=data))
    return tasks


def parse_python_call(text: str, docs: Mapping[str, tuple[str, _Doc]]) -> ToolCall:
    """`name(1, key='x')` with literal arguments, as ground truths are written. Raises ValueError on anything else."""
    try:
        call = ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"not a call: {text}") from error
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
        raise ValueError(f"not a plain call: {text}")
    if call.func.id not in docs:
        raise ValueError(f"call of an unknown tool: {text}")
    names = [*_parameters(docs[call.func.id][1])]
    if len(call.args) > len(names):
        raise ValueError(f"too many arguments: {text}")
    arguments = {name: ast.literal_eval(value) for name, value in zip(names, call.args, strict=False)}
    for keyword in call.keywords:
        if keyword.arg is None or keyword.arg in arguments:
            raise ValueError(f"unclear arguments: {text}")
        arguments[keyword.arg] = ast.literal_eval(keyword.value)
    return ToolCall(call.func.id, arguments)


def _official(name: str) -> ModuleType:
    try:
        return importlib.import_module(f"bfcl_eval.{name}" if name else "bfcl_eval")
    except ModuleNotFoundError as error:
        raise ConfigError(f"env.name=bfcl: the package bfcl-eval is missing ({error}); {_HOW_TO_INSTALL}") from error


def _make_services(task: Task) -> dict[str, object]:
    config = _official("constants.executable_backend_config")
    services: dict[str, object] = {}
    for class_name in cast(list[str], task.data["involved_classes"]):
        if class_name not in config.CLASS_FILE_PATH_MAPPING:
            raise ValueError(f"{task.id}: bfcl-eval knows no service {class_name}")
        module = importlib.import_module(config.CLASS_FILE_PATH_MAPPING[class_name])
        service = getattr(module, class_name)()
        if class_name not in config.STATELESS_CLASSES:
            scenario = cast(dict[str, Json], task.data["initial_config"]).get(class_name, {})
            service._load_scenario(copy.deepcopy(scenario), long_context=False)
        services[class_name] = service
    return services


@lru_cache(maxsize=128)
def _tool_docs(class_names: tuple[str, ...]) -> Mapping[str, tuple[str, _Doc]]:
    """Tool name → (service, official document)."""
    config = _official("constants.executable_backend_config")
    folder = Path(str(_official("").__file__)).parent / "data" / "multi_turn_func_doc"
    docs: dict[str, tuple[str, _Doc]] = {}
    for class_name in class_names:
        for doc in read_rows(folder / config.MULTI_TURN_FUNC_DOC_FILE_MAPPING[class_name], {"name": str}):
            docs[str(doc["name"])] = (class_name, doc)
    return docs


def _parameters(doc: _Doc) -> dict[str, Json]:
    return cast(dict[str, dict[str, Json]], doc["parameters"])["properties"]


def _schema(doc: _Doc) -> Mapping[str, Json]:
    function: dict[str, Json] = {name: doc[name] for name in ("name", "description")}
    return {"type": "function", "function": {**function, "parameters": _with_json_types(doc["parameters"])}}


def _with_json_types(schema: Json) -> Json:
    """BFCL's types (dict, float, …) as JSON schema's (object, number, …)."""
    if isinstance(schema, list):
        return [_with_json_types(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: _JSON_TYPES.get(value, value) if key == "type" and isinstance(value, str) else _with_json_types(value)
        for key, value in schema.items()
    }


def _too_large(arguments: Mapping[str, Json]) -> str:
    """Why these arguments would cost too much ("" when they do not): a power can fill the memory."""
    for name, value in arguments.items():
        if isinstance(value, int | float) and not abs(value) <= _MAX_BY_NAME.get(name, _MAX_NUMBER):
            return f"{name} is too large"
    return ""
