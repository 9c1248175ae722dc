"""Fixtures for tests that start real processes; what these said is shown when a test fails."""

from collections.abc import Iterator

import pytest

from tests.processes import Scene

_SCENES: list[Scene] = []


@pytest.fixture
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """Give a place to start processes in; they end with the test."""
    yield from _open_scene(tmp_path_factory)


@pytest.fixture(scope="module")
def module_scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """Give a place for processes that a module's tests share."""
    yield from _open_scene(tmp_path_factory)


@pytest.fixture(scope="session")
def session_scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """Give a place for processes that all tests share."""
    yield from _open_scene(tmp_path_factory)


def _open_scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    opened = Scene(tmp_path_factory.mktemp("scene"))
    _SCENES.append(opened)
    try:
        yield opened
    finally:
        _SCENES.remove(opened)
        opened.close()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Iterator[None]:
    """Put the logs of every process under the report of a test that failed."""
    report = yield
    if report.failed:
        for opened in _SCENES:
            report.sections.append(("processes", opened.logs()))
    return report
