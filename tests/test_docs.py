"""Examples in docstrings and in the README run and say what they show."""

import doctest
import re
from pathlib import Path

import pytest

from discedit import ops

ROOT = Path(__file__).parent.parent


def test_docstring_examples():
    result = doctest.testmod(ops)
    assert result.attempted >= 8
    assert result.failed == 0


def test_every_op_documents_its_contract():
    for name in ops.__all__:
        text = getattr(ops, name).__doc__ or ""
        assert len(text) > 100, name
        if name != "ClassMoments":
            assert "Raises" in text, name
            assert ">>>" in text, name


@pytest.mark.data
def test_readme_example_runs(cifar, capsys):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
    assert "parameters:" in capsys.readouterr().out
