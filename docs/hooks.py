"""What the site does beyond MkDocs' settings: pages from outside docs/, and docstrings as they are written here."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

DOCS = Path(__file__).parent
ROOT = DOCS.parent
OUTSIDE = ("CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/*.md", "benchmarks/*.png", "examples/*.py")
ACROSS = re.DOTALL | re.MULTILINE
LINK = re.compile(r"\]\(([^()\s]+)\)")
CODE = re.compile(r"^( *)```.*?^\1```$|\[[^\]]*\]\([^)]*\)|^#.*?$|`([A-Za-z_][\w.]*)`", ACROSS)
# What the reference holds, by all names that a reader may call it: "pool", "ops.pool", "discedit.ops.pool".
REFERENCE = {
    ".".join(parts[first:]): name
    for page in sorted((DOCS / "reference").glob("*.md"))
    for name in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE)
    for parts in [name.split(".")]
    for first in range(len(parts))
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the files of OUTSIDE, as pages of their own, where they lie in the repository."""
    for path in (path for pattern in OUTSIDE for path in sorted(ROOT.glob(pattern))):
        name = path.relative_to(ROOT).as_posix()
        if path.suffix == ".py":
            text = f"# {name}\n\n```python\n{path.read_text()}```\n"
            files.append(File.generated(config, site_uri(name), content=text))
        else:
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links between files of the repository become links between pages, and names in code links to the reference."""
    uri = page.file.src_uri
    here = posixpath.dirname(f"docs/{uri}" if (DOCS / uri).is_file() else uri)

    def link(match: re.Match[str]) -> str:
        target, *anchor = match[1].split("#", 1)
        found = site_uri(posixpath.normpath(posixpath.join(here, target)))
        if not target or files.get_file_from_path(found) is None:
            return match[0]
        return f"]({'#'.join([posixpath.relpath(found, posixpath.dirname(uri) or '.'), *anchor])})"

    return linked(LINK.sub(link, markdown), prefix="discedit.")


def site_uri(path: str) -> str:
    """Where the site has a file of the repository."""
    return re.sub(r"\.py$", ".md", path.removeprefix("docs/"))


def linked(text: str, prefix: str = "", without: Collection[str] = ()) -> str:
    """The text with `name` in code as a link to the reference, but not in headings, links and blocks."""

    def link(match: re.Match[str]) -> str:
        name = match[2]
        if not name or not name.startswith(prefix) or name in without:
            return match[0]
        owner, _, member = name.rpartition(".")
        if owner in REFERENCE and name not in REFERENCE:  # not every attribute has a place of its own
            return f'<autoref optional identifier="{REFERENCE[owner]}.{member}"><code>{name}</code></autoref>'
        return f"[`{name}`][{REFERENCE[name]}]" if name in REFERENCE else match[0]

    return CODE.sub(link, text)


def several(names: re.Match[str]) -> str:
    """Names as one word without a type."""
    return "    " + names[1].replace(" ", "\N{NO-BREAK SPACE}") + " ():"


class Docstrings(griffe.Extension):
    """Examples get their fences, several names for one text stay together, and names in code get their links."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            text = re.sub(r"^>>> .*?(?=\n\n|\Z)", r"```pycon\n\g<0>\n```", obj.docstring.value, flags=ACROSS)
            # Of "m2, m3: sums", what follows the first blank would be taken for a type; none has to be said.
            text = re.sub(r"^ {4}(([a-z]\w*, )+[a-z]\w*):", several, text, flags=re.MULTILINE)
            near = {obj.name, *(argument.name for argument in getattr(obj, "parameters", ()))}
            if obj.parent is not None and obj.parent.is_class:
                near |= obj.parent.members.keys()
            obj.docstring.value = linked(text, without=near)
