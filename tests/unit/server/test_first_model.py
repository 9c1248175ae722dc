"""The model that a run begins with."""

import asyncio
from pathlib import Path

from fedserver.models.first_model import first_model
from tests.server_run import ServerRun, serving


def test_a_first_model_is_a_function_of_seed_and_draw(tmp_path: Path) -> None:
    """Drawn anew it is another model, the same for every server."""

    async def draw(server: ServerRun, num_redraws: int) -> str:
        model = await first_model(
            server.task,
            server.settings,
            num_redraws=num_redraws,
            checkpoints=server.checkpoints,
            threads=server.threads,
        )
        return model.digest

    with serving(tmp_path, seed=5) as server:
        first, again, redrawn = (asyncio.run(draw(server, number)) for number in (0, 0, 1))
    assert first == again != redrawn
    with serving(tmp_path / "other", seed=6) as server:
        assert asyncio.run(draw(server, 0)) != first
