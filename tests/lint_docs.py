"""Rules about texts, for `make lint`: a short README, blocks that tests/test_docs.py can run, short examples."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
LANGUAGES = {"python", "bash", "text", "bibtex", "json", "toml"}  # Python by another name would not run


def faults() -> Iterator[str]:
    readme = (ROOT / "README.md").read_text().splitlines()
    if len(readme) > 120:
        yield f"README.md must have at most 120 lines, it has {len(readme)}"
    commands = [line.split()[:2] for line in readme[:10] if line.startswith("make ")]
    if commands != [["make", "demo"], ["make", "test"]]:
        yield f"README.md must open with `make demo` and `make test`, got {commands}"
    for path in sorted((ROOT / "docs").rglob("*.md")):
        fences = re.findall(r"^( *)```(.*)$", path.read_text(), re.MULTILINE)
        if len(fences) % 2 or any(rest for _, rest in fences[1::2]):
            yield f"{path}: a block of code is not closed"
        if any(indent for indent, _ in fences):
            yield f"{path}: an indented block would not be run"
        for language in sorted({language for _, language in fences[::2]} - LANGUAGES):
            yield f"{path}: the language of a block must be one of {sorted(LANGUAGES)}, got {language!r}"
    for path in sorted((ROOT / "examples").glob("*.py")):
        if (lines := len(path.read_text().splitlines())) > 60:
            yield f"{path} must have at most 60 lines, it has {lines}"


if __name__ == "__main__":
    found = list(faults())
    sys.exit("\n".join(found) if found else 0)
