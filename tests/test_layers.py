"""The house rule: a layer imports only lower ones."""

import ast
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Each may import those before it. Names are modules of the package; "kernels" is the folder of that name,
# and "integrations" a package within, whose modules may import each other.
ORDER = [
    "_state _checks _budget _called _attention _batches _stream _files _group distributed _sharded _measure _forward",
    "_trace _calibration _contributions _lockstep _repair _optimizers",
    "kernels reference",
    "_backends _library",
    "ops moments uncertainty scores",
    "_checkpoint _pass collect fidelity recipe stack _dependencies _graph _importance _compensation prune",
    "_selection _silence _retain _relevance _erase unlearn presets",
    "_outputs _attacks _probes _recovery evaluate zoo huggingface integrations",
    "_colours _sections _pngs report demo",
    "_sources _images _runs _arguments _commands cli __main__",
]
RANK = {module: rank for rank, module in enumerate(" ".join(ORDER).split())}
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


def test_every_module_has_a_rank():
    modules = {path.stem for path in (ROOT / "discedit").glob("*.py")} - {"__init__"}
    folders = {path.parent.name for path in (ROOT / "discedit").glob("*/__init__.py")}
    assert modules | folders == set(RANK) - {"kernels"}


@pytest.mark.parametrize("module", sorted(RANK))
def test_imports_point_down(module):
    folder = ROOT / "kernels" if module == "kernels" else ROOT / "discedit" / module
    for path in folder.glob("*.py") if folder.is_dir() else [folder.with_suffix(".py")]:
        others = imported(path) - ({module} if folder.is_dir() else set())
        above = {other for other in others if RANK.get(other, len(RANK)) >= RANK[module]}
        assert not above, f"{path.name} imports {above}, which stand at its level or above"


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
