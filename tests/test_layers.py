"""The house rule: a layer imports only lower ones."""

import ast
import graphlib
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Floors of the house. A room (a sub-package, or a module of the top folder) imports rooms of lower floors; its own
# modules may import each other. "kernels" is the folder of that name.
FLOORS = [
    "common",
    "kernels backends zoo",
    "ops model",
    "moments recipes",
    "distributed graph scoring",
    "uncertainty selection",
    "fidelity repair",
    "editing evaluation integrations reporting",
    "presets cli huggingface",
]
RANK = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms.split()}
CSRC = [{"common"}, {"cpu", "cuda"}, {"bindings"}]


def imported(path: Path) -> set[str]:
    """Modules of discedit that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            if node.module == "discedit":
                found |= {alias.name for alias in node.names}
            elif node.module and node.module.startswith("discedit."):
                found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("discedit.")}
    return found


def names_within(path: Path, prefix: str) -> set[str]:
    """Modules of its own room that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            if node.module.startswith(prefix):
                found.add(node.module.removeprefix(prefix))
            elif f"{node.module}." == prefix:
                found |= {alias.name for alias in node.names}
    return found


def test_every_room_has_a_floor():
    modules = {path.stem for path in (ROOT / "discedit").glob("*.py")} - {"__init__", "__main__"}
    folders = {path.parent.name for path in (ROOT / "discedit").glob("*/__init__.py")}
    assert modules | folders == set(RANK) - {"kernels"}


@pytest.mark.parametrize("room", sorted(RANK))
def test_imports_point_down(room):
    folder = ROOT / "kernels" if room == "kernels" else ROOT / "discedit" / room
    for path in folder.glob("*.py") if folder.is_dir() else [folder.with_suffix(".py")]:
        beside = {other for other in imported(path) - {room} if RANK.get(other, len(RANK)) >= RANK[room]}
        assert not beside, f"{path.name} imports {beside}, which stand on its floor or above"


def test_modules_of_a_room_import_no_circle():
    for folder in {path.parent for path in (ROOT / "discedit").glob("*/__init__.py")}:
        prefix = f"discedit.{folder.name}."
        needs = {path.stem: names_within(path, prefix) for path in folder.glob("*.py") if path.stem != "__init__"}
        graphlib.TopologicalSorter(needs).prepare()  # raises CycleError, which names the circle


def test_the_core_knows_no_torch_and_includes_point_down():
    rank_of = {folder: rank for rank, folders in enumerate(CSRC) for folder in folders}
    paths = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cpp", ".hpp", ".cu")]
    assert {path.parent.name for path in paths} == set(rank_of)
    for path in paths:
        rank = rank_of[path.parent.name]
        for include in re.findall(r'#include\s*[<"]([^>"]+)[>"]', path.read_text()):
            assert not include.startswith(("torch/", "ATen/", "c10/")), f"{path.name} includes {include}"
            if path.parent.name != "bindings":
                assert not include.startswith("pybind11"), f"{path.name} includes {include}"
            layer = re.match(r"\.\./(\w+)/", include)
            if layer:
                assert rank_of[layer.group(1)] < rank, f"{path.name} includes {include}"


def test_setup_does_not_import_torch():
    tree = ast.parse((ROOT / "setup.py").read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not any(str(name).split(".")[0] in ("torch", "discedit") for name in names | modules)


def test_importing_discedit_needs_torch_numpy_and_safetensors_alone():
    """What prunes, draws or shows progress imports its own libraries when it does: where one only scores, they may be
    missing."""
    code = """
        import sys, torch
        class Missing:
            def find_spec(self, name, path=None, target=None):
                known = {*sys.stdlib_module_names, "discedit", "numpy", "safetensors"}
                if path is None and name not in known:
                    raise ImportError(f"{name} is not here")
        sys.meta_path.insert(0, Missing())
        import discedit
        from discedit import ops, reference, fidelity, zoo
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=120)
