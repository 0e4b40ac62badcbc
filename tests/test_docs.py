"""Examples in docstrings and in the README run and say what they show."""

import doctest
import re
from importlib import import_module
from pathlib import Path

import pytest

from discedit import collect, ops, presets, scores, uncertainty

ROOT = Path(__file__).parent.parent
evaluate = import_module("discedit.evaluate")  # the package gives the name to the function


@pytest.mark.parametrize(
    ("module", "examples"), [(ops, 29), (collect, 8), (scores, 4), (uncertainty, 10), (presets, 1), (evaluate, 7)]
)
def test_docstring_examples(module, examples):
    result = doctest.testmod(module)
    assert result.attempted >= examples
    assert result.failed == 0


def test_every_op_documents_its_contract():
    for name in ops.__all__:
        text = getattr(ops, name).__doc__ or ""
        assert len(text) > 100, name
        if name not in ("ClassMoments", "VectorMoments"):
            assert "Raises" in text, name
            assert ">>>" in text, name


def test_readme_example_runs(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
    assert "parameters:" in capsys.readouterr().out
    assert (tmp_path / "out" / "prune.json").exists()


def test_readme_is_short_and_opens_with_the_two_commands():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 120
    commands = [line.split()[:2] for line in lines[:10] if line.startswith("make ")]
    assert commands == [["make", "demo"], ["make", "test"]]
