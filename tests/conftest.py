"""Fixtures for tests that start real processes; their logs and files are kept when a test fails."""

import shutil
from collections.abc import Generator, Iterator

import pytest

from tests.processes import Scene

_SCENES: list[Scene] = []
_FAILED: set[Scene] = set()


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
        # State-dirs and models of the whole suite would fill gigabytes of the disk.
        if opened not in _FAILED:
            shutil.rmtree(opened.folder, ignore_errors=True)
        _FAILED.discard(opened)


def pytest_runtest_setup() -> None:
    """Begin a page in the logs of processes that tests share."""
    for opened in _SCENES:
        opened.mark()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Put the logs of every process under the report of a test that failed."""
    report = yield
    if report.failed:
        _FAILED.update(_SCENES)
        report.sections += [("processes", opened.logs()) for opened in _SCENES]
    return report
