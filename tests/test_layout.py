"""The architecture that DESIGN draws, held against the imports that the code has."""

import ast
import pathlib

import pytest

from lumos_jax.tasks import task_names

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "lumos_jax"
ROOMS = (
    "data",
    "scenes",
    "weights",
    "encoders",
    "models",
    "diffusion",
    "tasks",
    "train",
    "checkpoints",
    "evaluation",
    "planning",
    "preparation",
    "pages",
)

# Room -> rooms that it may import; every room may import the leaves below.
ALLOWED = {
    "data": {"scenes"},
    "scenes": set(),
    "weights": set(),
    "encoders": {"weights"},
    "models": set(),
    "diffusion": set(),
    "tasks": {"encoders", "models", "diffusion", "data", "weights"},
    "evaluation": {"scenes", "data", "encoders", "weights"},
    "checkpoints": {"weights"},
    "train": {
        "data",
        "tasks",
        "encoders",
        "models",
        "diffusion",
        "checkpoints",
        "evaluation",
        "weights",
    },
    "planning": {"data", "tasks", "train"},
    "preparation": {"data", "scenes", "tasks", "train"},
    "pages": {"data", "tasks", "diffusion", "checkpoints", "evaluation", "train", "sample"},
}
LEAVES = {"config", "exit_codes", "fileio", "progress"}


def imports(path: pathlib.Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def rooms_of(path: pathlib.Path) -> set[str]:
    return {name.split(".")[1] for name in imports(path) if name.startswith("lumos_jax.")}


@pytest.mark.parametrize("room", ROOMS)
def test_imports_point_one_way(room):
    files = list((PACKAGE / room).rglob("*.py"))
    assert files
    for path in files:
        stray = rooms_of(path) - ALLOWED[room] - LEAVES - {room}
        assert not stray, f"{path.relative_to(ROOT)} imports {sorted(stray)}"


def module_file(name: str) -> pathlib.Path | None:
    """The file of a module of ours; None of others' and of names that are no module."""
    path = ROOT.joinpath(*name.split("."))
    if name.split(".")[0] != "lumos_jax":
        return None
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def imported_files(path: pathlib.Path) -> set[pathlib.Path]:
    """Files of ours that a file imports, at the top or in a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {module_file(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            # What is imported is a module itself, or a name within one.
            found |= {module_file(f"{node.module}.{alias.name}") or module_file(node.module) for alias in node.names}
    return found - {None, path}


def cycles(graph: dict) -> list[set]:
    """The strongly connected components of two nodes or more: those that reach each other."""
    reached = {node: {node} for node in graph}
    changed = True
    while changed:
        changed = False
        for node, direct in graph.items():
            wider = reached[node].union(*(reached[other] for other in direct))
            changed |= wider != reached[node]
            reached[node] = wider
    found = {frozenset(o for o in reached[node] if node in reached[o]) for node in graph}
    return [set(component) for component in found if len(component) > 1]


KNOWN_CYCLES: list[set[str]] = []  # only to be shortened


def test_no_two_files_import_each_other():
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [{"a", "b", "c"}]
    graph = {path: imported_files(path) for path in PACKAGE.rglob("*.py")}
    assert len(graph[PACKAGE / "data" / "pipeline.py"]) > 3
    found = [{str(path.relative_to(PACKAGE)) for path in component} for component in cycles(graph)]
    assert sorted(map(sorted, found)) == sorted(map(sorted, KNOWN_CYCLES))


def test_settings_import_no_room_but_for_the_registries_of_data():
    for path in (PACKAGE / "config").glob("*.py"):
        more = {"io.py": {"fileio", "tasks"}, "documentation.py": {"tasks", "preparation"}, "data.py": {"data"}}
        assert rooms_of(path) <= {"config"} | more.get(path.name, set())
    for path in (PACKAGE / "data").rglob("*.py"):
        assert "config" not in rooms_of(path), path


def test_only_models_and_encoders_and_weights_import_flax():
    for path in PACKAGE.rglob("*.py"):
        if path.parent.name not in ("models", "encoders", "weights"):
            assert not any(name.split(".")[0] == "flax" for name in imports(path)), path


def test_torch_is_no_dependency():
    for path in PACKAGE.rglob("*.py"):
        assert not any(name.split(".")[0] in ("torch", "diffusers") for name in imports(path)), path
    assert "torch" not in (ROOT / "requirements.txt").read_text()


def test_only_tasks_and_configs_know_task_names():
    for path in PACKAGE.rglob("*.py"):
        if "tasks" in path.parts or (path.parent.name == "config" and path.name in ("settings.py", "migration.py")):
            continue  # the default's name, and groups of earlier layouts
        strings = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
        assert not strings & set(task_names()), path


def test_files_stay_small():
    long = {str(p.relative_to(ROOT)): n for p in PACKAGE.rglob("*.py") if (n := len(p.read_text().splitlines())) > 450}
    assert not long
