"""Models that can't be sent or aggregated: one sentence at the server's start."""

from pathlib import Path

import pytest

from fedrounds.errors import InvalidInput
from fedrounds.tasks.task import Task
from fedserver.server import run_server
from fedserver.settings import ServerSettings
from tests.entry_tasks import WORDS
from tests.tiny_task import tiny


@pytest.mark.parametrize("name", WORDS)
def test_a_model_that_cannot_be_sent_is_refused_in_one_sentence(tmp_path: Path, name: str) -> None:
    """It names the task and the entry; nothing is left behind."""
    settings = ServerSettings(task=f"tests.entry_tasks:{name}", state_dir=tmp_path / "server")
    with pytest.raises(InvalidInput, match=WORDS[name]) as caught:
        run_server(settings)
    assert str(caught.value).startswith(f"task '{name}': ")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "server").exists()


def test_a_declaration_that_does_not_exist_is_refused() -> None:
    """Where the task is made."""
    with pytest.raises(InvalidInput, match="can't be declared 'mode'; declare one of keep, max"):
        Task(**{**vars(tiny), "entries": {"*": "mode"}})
