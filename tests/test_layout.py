"""The architecture that DESIGN draws, held against the imports that the code has."""

import ast
import pathlib

import pytest

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
)

# Room -> rooms that it may import; every room may import the leaves below.
ALLOWED = {
    "data": {"scenes"},
    "scenes": {"data"},
    "weights": set(),
    "encoders": {"weights"},
    "models": set(),
    "diffusion": set(),
    "tasks": {"encoders", "models", "diffusion", "data", "weights"},
    "evaluation": {"scenes"},
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
    "preparation": {"data", "tasks", "train"},
}
LEAVES = {"config", "fileio"}


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


def test_settings_import_no_room():
    for path in (PACKAGE / "config").glob("*.py"):
        assert rooms_of(path) <= {"config"} | (
            {"fileio", "tasks"} if path.name in ("io.py", "documentation.py") else set()
        )


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
        if "tasks" in path.parts or (path.parent.name == "config" and path.name in ("tasks.py", "migration.py")):
            continue  # the default's name, and groups of earlier layouts
        strings = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
        assert not strings & {"i2i", "t2i", "nvs", "i2v", "dino", "class_conditional", "unconditional", "rcg"}, path


def test_files_stay_small():
    long = {str(p.relative_to(ROOT)): n for p in PACKAGE.rglob("*.py") if (n := len(p.read_text().splitlines())) > 450}
    assert not long
