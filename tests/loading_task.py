"""A task whose data come from processes of its own: `--task tests.loading_task:loading`.

The environment says how one side reads the examples of tests.tiny_task: LOADING_BY those of a
client, LOADING_TEST_BY the held-out set. Either is one of these words, or several after another:

    fork, spawn  a multiprocessing.Pool that starts its workers so
    workers      the workers of a DataLoader
    program      a program beside it
    deaf         this process alone, which swallows every interruption

LOADING_S says for how many seconds each of these processes goes on before it gives its result. Each
says its process id on standard error.
"""

import functools
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fedrounds.tasks.task import DataRequest, Examples
from tests.tiny_task import tiny

_SECONDS = float(os.environ.get("LOADING_S", "0"))
_SLEEP = "import time, sys; time.sleep(float(sys.argv[1]))"


def _announce(pid: int) -> None:
    print(f"loading in process {pid}", file=sys.stderr, flush=True)


def _read(examples: Dataset[tuple[Tensor, ...]], number: int) -> tuple[Tensor, ...]:
    _announce(os.getpid())
    time.sleep(_SECONDS)
    return examples[number]


class _Slow(Dataset[tuple[Tensor, ...]]):
    def __init__(self, examples: Dataset[tuple[Tensor, ...]]) -> None:
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)  # type: ignore[arg-type]

    def __getitem__(self, number: int) -> tuple[Tensor, ...]:
        return _read(self._examples, number)


def _by_pool(method: str, examples: Any) -> None:  # noqa: ANN401
    with multiprocessing.get_context(method).Pool(2) as pool:
        pool.map(functools.partial(_read, examples), range(4), chunksize=2)


def _by_workers(examples: Any) -> None:  # noqa: ANN401
    for _ in DataLoader(_Slow(examples), batch_size=16, num_workers=2):
        pass


def _by_program(_: Examples) -> None:
    with subprocess.Popen([sys.executable, "-c", _SLEEP, str(_SECONDS)]) as program:
        try:
            # The signal may come as soon as this is read.
            _announce(program.pid)
            assert program.wait() == 0
        except KeyboardInterrupt:
            program.terminate()
            raise


def _deaf(_: Examples) -> None:
    _announce(os.getpid())
    until = time.monotonic() + _SECONDS
    while (left_s := until - time.monotonic()) > 0:
        with suppress(BaseException):
            time.sleep(left_s)


_WAYS: dict[str, Callable[[Examples], None]] = {
    "fork": functools.partial(_by_pool, "fork"),
    "spawn": functools.partial(_by_pool, "spawn"),
    "workers": _by_workers,
    "program": _by_program,
    "deaf": _deaf,
}


def _load(examples: Examples, variable: str) -> Examples:
    for name in os.environ.get(variable, "").split():
        _WAYS[name](examples)
    return examples


def _load_train(request: DataRequest) -> Examples:
    return _load(tiny.load_train(request), "LOADING_BY")


def _load_test(root: Path | None) -> Examples:
    examples = tiny.load_test(root)
    assert examples is not None
    return _load(examples, "LOADING_TEST_BY")


loading = replace(tiny, name="loading", load_train=_load_train, load_test=_load_test)
