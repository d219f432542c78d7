"""The house keeps its plan: imports run one way, the core stays light, and no level has too many rooms.

The graph is drawn from the code with `ast`, so imports inside functions count as arrows too.
"""

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.paths import ROOT

# From the ground upwards: a wing may import the wings before it, never one after it.
ORDER = [
    "trace_async.types", "trace_async.printable", "trace_async.weights", "trace_async.weight_delta",
    "trace_async.engine", "trace_async.env",
    "trace_async.trees", "trace_async.method", "configs", "trace_async.config", "trace_async.tracking",
    "trace_async.run", "trace_async.rollout", "trace_async.policy", "trace_async.packing", "trace_async.predictor",
    "trace_async.learner", "trace_async.engines",
    "envs", "envs.multihop", "envs.math", "envs.functions", "envs.quest", "envs.text_worlds", "envs.agent",
    "envs.mcp",
    "actors",
    "scripts.start_policy", "scripts.comparison", "scripts.viewer", "scripts.commands", "scripts.api",
    "scripts.studies", "scripts.bench", "scripts.cli",
]  # fmt: skip

# What is slow to import, or is not there on every machine, and the only wings whose modules may import it at their top.
HEAVY = {
    "ray": {"actors"},
    "deepspeed": set(),
    "mlflow": set(),
    "sglang": set(),
    "vllm": {"trace_async.engines"},  # vllm_worker, which runs inside vLLM's own processes
    "peft": set(),
    "torch": {
        "trace_async.weights", "trace_async.policy", "trace_async.packing", "trace_async.predictor",
        "trace_async.learner", "trace_async.engines", "actors", "scripts.studies", "scripts.bench",
    },
    "transformers": {
        "trace_async.rollout", "trace_async.policy", "trace_async.learner", "trace_async.predictor",
        "trace_async.engines", "scripts.studies", "scripts.bench",
    },
}  # fmt: skip

MOST_NAMES = 12
# Stand in for packages that an engine imports; their names and layout are those packages'.
STAND_INS = ROOT / "trace_async/engines/cpu_stand_ins"
FOLDERS = ("trace_async", "envs", "actors", "scripts", "configs")


def modules() -> dict[str, Path]:
    files = [f for folder in FOLDERS for f in (ROOT / folder).rglob("*.py") if STAND_INS not in f.parents]
    names = {file: file.relative_to(ROOT).with_suffix("").parts for file in files}
    return {".".join(parts).removesuffix(".__init__"): file for file, parts in names.items()}


MODULES = modules()


def wing_of(module: str) -> str | None:
    """The longest name of ORDER that the module is or lies in."""
    parts = module.split(".")
    names = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
    return next((name for name in names if name in ORDER), None)


def imports(file: Path) -> Iterator[tuple[str, bool]]:
    """(module, whether it is imported when the file is) for every import of the file."""

    def visit(node: ast.AST, at_top: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, at_top) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.module is not None, f"{file}: a relative import"
                names = [f"{child.module}.{alias.name}" for alias in child.names]
                yield from ((name if name in MODULES else child.module, at_top) for name in names)
            else:
                inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) or _only_for_types(child)
                yield from visit(child, at_top and not inside)

    yield from visit(ast.parse(file.read_text(encoding="utf-8")), True)


def _only_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def test_every_module_has_a_wing_in_the_table():
    without = {name for name in MODULES if wing_of(name) is None}
    assert without <= {"trace_async", "scripts"}, "name the wing in ORDER"
    assert [wing for wing in ORDER if not any(name == wing or name.startswith(f"{wing}.") for name in MODULES)] == []


def test_imports_run_one_way():
    upwards = set()
    for name, file in MODULES.items():
        own = wing_of(name)
        for imported, _ in imports(file):
            other = wing_of(imported)
            if own is not None and other is not None and ORDER.index(other) > ORDER.index(own):
                upwards.add(f"{name} imports {imported}: {other} lies above {own}")
    assert sorted(upwards) == []


def test_no_module_imports_itself_by_a_detour():
    graph: dict[str, set[str]] = defaultdict(set)
    for name, file in MODULES.items():
        graph[name] = {imported for imported, at_top in imports(file) if at_top and imported in MODULES} - {name}
    # Modules that import nothing of what is left are taken away until none is found; what stays has a circle in it.
    left = set(graph)
    while free := {name for name in left if not graph[name] & left}:
        left -= free
    assert sorted(left) == []


def test_importing_the_core_needs_no_heavy_library():
    found = set()
    for name, file in MODULES.items():
        for imported, at_top in imports(file):
            library = imported.split(".")[0]
            if at_top and library in HEAVY and wing_of(name) not in HEAVY[library]:
                found.add(f"{name} imports {library} at its top: import it in the function that needs it")
    assert sorted(found) == []


@pytest.mark.parametrize(
    "folder",
    # scripts/commands is itself one list: a file for each command.
    sorted({file.parent for file in MODULES.values()} - {ROOT / "scripts/commands"}),
    ids=lambda folder: str(folder.relative_to(ROOT)),
)
def test_no_level_has_more_than_a_dozen_names(folder: Path):
    # Files and packages are counted apart, `__init__.py` not at all: the eye sees folders and files as two lists.
    files = [f.name for f in folder.iterdir() if f.suffix == ".py" and f.name != "__init__.py"]
    packages = [f.name for f in folder.iterdir() if f.is_dir() and any(f.glob("*.py"))]
    assert len(files) <= MOST_NAMES, sorted(files)
    assert len(packages) <= MOST_NAMES, sorted(packages)


@pytest.mark.parametrize("name", sorted(n for n, file in MODULES.items() if file.name == "__init__.py"))
def test_every_package_says_in_a_sentence_what_lives_there(name: str):
    docstring = ast.get_docstring(ast.parse(MODULES[name].read_text(encoding="utf-8")))
    assert docstring, f"{name}/__init__.py needs a docstring"
    assert "." in docstring
    assert len(docstring) > 20
