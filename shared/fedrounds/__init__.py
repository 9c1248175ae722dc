"""What server and clients share, and what your own code imports: no sockets, no database.

The names of `__all__` are imported when they are first used: torch takes seconds, and a command
such as `--help` doesn't need it.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedrounds.data import load_data, make_loader
    from fedrounds.diagnosis.values import DoctorSettings
    from fedrounds.doctor import Doctor
    from fedrounds.tasks.builtin import need_root
    from fedrounds.tasks.task import DataRequest, Partition, Task
    from fedrounds.training.evaluation import evaluate
    from fedrounds.training.loop import train_model

__version__ = "0.1.0"

__all__ = [
    "DataRequest",
    "Doctor",
    "DoctorSettings",
    "Partition",
    "Task",
    "evaluate",
    "load_data",
    "make_loader",
    "need_root",
    "train_model",
]

_HOMES = {
    "DataRequest": "fedrounds.tasks.task",
    "Doctor": "fedrounds.doctor",
    "DoctorSettings": "fedrounds.diagnosis.values",
    "Partition": "fedrounds.tasks.task",
    "Task": "fedrounds.tasks.task",
    "evaluate": "fedrounds.training.evaluation",
    "load_data": "fedrounds.data",
    "make_loader": "fedrounds.data",
    "need_root": "fedrounds.tasks.builtin",
    "train_model": "fedrounds.training.loop",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'fedrounds' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
