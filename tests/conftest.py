"""The Elasticsearch server that tests share, and a line at the end of a run that names it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from tests.elastic import NoidaDb


@pytest.fixture(scope="session")
def elastic_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """FLYWHEEL_TEST_ES_URL, http(s)://host:port of a real cluster, or a noida-db of our own, which speaks the same API.

    Credentials of a real cluster come from the variables that the store itself reads.
    """
    if url := os.environ.get("FLYWHEEL_TEST_ES_URL"):
        yield url.rstrip("/")
    elif NoidaDb.program() is None:
        pytest.skip("needs noida-db (pip install -e '.[dev]') or FLYWHEEL_TEST_ES_URL")
    else:
        with NoidaDb(tmp_path_factory.mktemp("noida")) as server:
            yield server.url


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Name the servers that tests spoke to: they record them as the property `elasticsearch`."""
    reports = [r for found in terminalreporter.stats.values() for r in found if hasattr(r, "user_properties")]
    servers = {value for report in reports for name, value in report.user_properties if name == "elasticsearch"}
    for server in sorted(servers):
        terminalreporter.write_line(f"Elasticsearch API: {server}")
