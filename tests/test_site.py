"""The site builds without a warning, holds every public name, has no dead link and loads nothing from another host."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote, urlsplit

import pytest

import discedit
from discedit import zoo

ROOT = Path(__file__).parent.parent
NEEDS = ("mkdocs", "material", "mkdocstrings_handlers.python")

try:
    missing = [name for name in NEEDS if find_spec(name) is None]
except ModuleNotFoundError as error:
    missing = [str(error.name)]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing), reason=f"needs {missing}: pip install 'discedit[docs]'"),
]


class Page(HTMLParser):
    """What a page links to, what it loads, and the anchors that it has."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text = path.read_text()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.feed(self.text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        of = {name: value or "" for name, value in attributes}
        self.anchors |= {of[name] for name in ("id", "name") if name in of}
        if tag == "a" and "href" in of:
            self.links.append(of["href"])
        elif "src" in of or (tag == "link" and of.get("rel") not in ("canonical", "next", "prev")):
            self.loads.append(of.get("src") or of["href"])


def build(folder: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr  # --quiet would hide warnings from --strict


@pytest.fixture(scope="module")
def site(made_once) -> dict[Path, Page]:
    folder = made_once("site", build)
    # The error page has links from the root of a host, since nobody knows where it is shown.
    return {path: Page(path) for path in sorted(folder.rglob("*.html")) if path.name != "404.html"}


def public_names() -> list[str]:
    """Functions and classes that the package shows, with their methods and properties that have a docstring."""
    found: dict[str, object] = {}
    for name, value in [("zoo", zoo), *((name, getattr(discedit, name)) for name in discedit.__all__)]:
        if isinstance(value, ModuleType):
            names = getattr(value, "__all__", None) or [
                inner
                for inner, member in vars(value).items()
                if (inspect.isfunction(member) or inspect.isclass(member)) and member.__module__ == value.__name__
            ]
            found |= {f"discedit.{name}.{inner}": getattr(value, inner) for inner in names if inner[0] != "_"}
        else:
            found[f"discedit.{name}"] = value
    for name, value in list(found.items()):
        if inspect.isclass(value):
            members = {inner for inner in vars(value) if inner[0] != "_"}
            found |= {f"{name}.{inner}": None for inner in members if is_documented(getattr(value, inner))}
    return sorted(found)


def is_documented(member: object) -> bool:
    return (inspect.isroutine(member) or isinstance(member, property)) and bool(member.__doc__)


def test_every_public_name_is_in_the_reference(site):
    names = public_names()
    assert {"discedit.prune", "discedit.ops.pool", "discedit.Scores.interval", "discedit.zoo.digits"} <= set(names)
    anchors = {anchor for path, page in site.items() if path.parent.name == "reference" for anchor in page.anchors}
    assert [name for name in names if name not in anchors] == []


def test_docstrings_are_shown_as_they_are_meant(site):
    pages = [page.text for path, page in site.items() if path.parent.name == "reference"]
    assert len(pages) >= 8
    for text in pages:
        assert "<blockquote>" not in text  # of ">>>" outside a block of code
        assert not re.search(r"<p>(Args|Arguments|Returns|Raises|Attributes):", text)  # a section that is not seen
        assert not re.search(r"</code> \u2013 [^<]*\. [A-Z]\w+Error: ", text)  # two errors in one line
        assert not re.search(r",</span></code></b>| \(\)</", text)  # several names with one text, torn apart


def test_no_link_is_dead(site):
    dead, links = [], 0
    for path, page in site.items():
        for link in [*page.links, *page.loads]:
            url = urlsplit(link)
            if url.scheme or url.netloc:
                continue
            target = (path.parent / unquote(url.path)).resolve() if url.path else path
            target = target / "index.html" if target.is_dir() else target
            anchors = site[target].anchors if target in site else set()
            links += 1
            if not target.exists() or (url.fragment and url.fragment not in anchors):
                dead.append(f"{path.name}: {link}")
    assert dead == []
    assert links > 500


def test_nothing_is_loaded_from_another_host(site):
    folder = min(site, key=lambda path: len(path.parts)).parent
    for path, page in site.items():
        assert [load for load in page.loads if urlsplit(load).netloc] == [], path.name
        assert "mermaid" not in page.text  # which the theme would fetch
    sheets = list(folder.rglob("*.css"))
    assert sheets
    for sheet in sheets:
        assert not re.search(r"(url\(|@import)\W*(https?:)?//", sheet.read_text()), sheet.name
