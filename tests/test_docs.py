"""Examples in docstrings, in the README and on the pages run and say what they show; commands are ones that exist."""

import copy
import doctest
import re
import shlex
import sys
from importlib import import_module
from pathlib import Path

import pytest
from helpers import operations_of

from discedit import ops, presets, zoo
from discedit.cli import main as cli
from discedit.evaluation import evaluate
from discedit.moments import collect
from discedit.reporting import report
from discedit.scoring import scores, uncertainty

ROOT = Path(__file__).parent.parent
PAGES = {path.relative_to(ROOT).as_posix(): path for path in sorted((ROOT / "docs").rglob("*.md"))}


@pytest.mark.parametrize(
    ("module", "examples"),
    [(ops, 29), (collect, 8), (scores, 4), (uncertainty, 10), (presets, 1), (evaluate, 5), (report, 6)],
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


def test_readme_example_runs(capsys, tmp_path, monkeypatch, trained_once):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(zoo, "train_digits_net", trained_once)
    readme = blocks(ROOT / "README.md", "python")
    assert readme
    namespace = {}
    for block in readme:
        exec(compile(block, "README.md", "exec"), namespace)
    assert "parameters:" in capsys.readouterr().out
    assert (tmp_path / "out" / "prune.json").exists()


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(), re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def trained_once():
    """`zoo.train_digits_net` that trains each network only once: most pages begin with the same."""
    networks, really = {}, zoo.train_digits_net

    def train(data, **options):
        key = (len(data), *sorted(options.items()))
        if key not in networks:
            networks[key] = really(data, **options)
        return copy.deepcopy(networks[key])

    return train


@pytest.mark.slow
@pytest.mark.parametrize("page", [name for name, path in PAGES.items() if blocks(path, "python")])
def test_examples_of_a_page_run(page, tmp_path, monkeypatch, trained_once):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(zoo, "train_digits_net", trained_once)
    monkeypatch.setattr("discedit.editing.latency.stopwatch", operations_of)  # or chance would decide what it warns of
    namespace = {"__name__": "__main__"}
    for number, block in enumerate(blocks(PAGES[page], "python"), start=1):
        exec(compile(block, f"{page}, block {number}", "exec"), namespace)


def commands() -> dict[str, list[str]]:
    """Command and its words -> pages, of all lines of bash blocks and of what the text calls a command."""
    found: dict[str, list[str]] = {}
    for name, path in PAGES.items():
        lines = "".join(blocks(path, "bash")).replace("\\\n", " ").splitlines()
        for line in [*lines, *re.findall(r"`((?:discedit|make|python -m) [^`\n]+)`", path.read_text())]:
            found.setdefault(line, []).append(name)
    return found


@pytest.mark.parametrize("command", commands())
def test_a_command_can_be_given(command, capsys, monkeypatch):
    words = shlex.split(command, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words.pop(0)
    options = [word.split("=")[0] for word in words if word.startswith("--")]
    match [Path(word).name for word in words[:1]] + words[1:3]:
        case ["make", target, *_]:
            assert f"\n{target}:" in (ROOT / "Makefile").read_text()
        case ["discedit", first, *_]:
            assert cli.main(["--help"] if first.startswith("-") else [first, "--help"]) == 0
            assert_named(options, capsys.readouterr().out)
        case ["python", "-m", module] if module.startswith("benchmarks."):
            main = import_module(module).main
            if "argparse" not in Path(sys.modules[module].__file__).read_text():
                assert not options
                return
            monkeypatch.setattr(sys, "argv", [module, "--help"])
            with pytest.raises(SystemExit, match="^0$"):
                main()
            assert_named(options, capsys.readouterr().out)


def assert_named(options: list[str], text: str) -> None:
    for option in options:
        assert re.search(rf"{option}\b", text), f"{option} is not among the options"
