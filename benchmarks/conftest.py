"""`--write-readme` puts the tables that a run measured into benchmarks/README.md."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from benchmarks._common import PlainRead, Table


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--write-readme", action="store_true", help="write the tables that were measured to benchmarks/README.md"
    )


@pytest.fixture(scope="session")
def read() -> PlainRead:
    return PlainRead()


@pytest.fixture(scope="module")
def table(request: pytest.FixtureRequest) -> Iterator[Callable[[Table], Table]]:
    """Registers a table of the module; it is written once all of the module's benchmarks have passed."""
    tables: dict[str, Table] = {}
    failures = request.session.testsfailed

    def register(blank: Table) -> Table:
        return tables.setdefault(blank.section, blank)

    yield register
    if request.config.getoption("--write-readme") and request.session.testsfailed == failures:
        for measured in tables.values():
            measured.write()
