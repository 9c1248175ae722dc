"""The model that a run begins with."""

import torch

from fedrounds.seeds import derive_seed
from fedrounds.tasks.models import initialise
from fedrounds.tasks.task import Task, build_model
from fedserver.models.checkpoints import Checkpoints, GlobalModel
from fedserver.runtime import Threads
from fedserver.settings import ServerSettings


async def first_model(
    task: Task,
    settings: ServerSettings,
    *,
    num_redraws: int,
    checkpoints: Checkpoints,
    threads: Threads,
) -> GlobalModel:
    """Return the model that a run begins with, after `num_redraws` further draws."""
    # The first draw's seed is as it was before there were others.
    seed = derive_seed(settings.seed, "init", attempt=num_redraws)
    state_dict = await threads.on_disk(initial_state, task, seed=seed, init=settings.init)
    return await threads.on_disk(checkpoints.save_initial, state_dict)


def initial_state(task: Task, *, seed: int, init: str = "default") -> dict[str, torch.Tensor]:
    """Return the weights a run begins with, a function of the task, `seed` and `init`.

    `init` is a name in fedrounds.tasks.models.INITIALISATIONS; "default" leaves the weights to the
    task.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_model(task)
        initialise(model, init)
        return model.state_dict()
