"""Faults in the inputs that are learned from."""

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.doctor_cases import data, tasks
from benchmarks.doctor_cases.cases import (
    Case,
    Expected,
    Outcome,
    drawing,
    every_value,
    log_uniform,
    one_value,
    plant_samples,
)
from benchmarks.doctor_cases.training import Batch, Data, Fault, Task
from fedrounds.diagnosis.values import Cause, StepPhase

_DATA = frozenset({Cause.BAD_DATA})
_INPUT = frozenset({StepPhase.INPUT})
# A finite outlier is bad from the input on, and its loss is the first number that shows it; where
# products overflow the first number that isn't finite arises further on, in whichever module.
_OUTLIER = frozenset({StepPhase.INPUT, StepPhase.FORWARD, StepPhase.LOSS, StepPhase.BACKWARD})
_ANYWHERE: frozenset[str] = frozenset()

NAN = math.nan
INF = math.inf


def bad_data() -> list[Case]:
    """Return the cases of samples that can't be learned from."""
    return [
        *_non_finite_inputs(),
        *_outliers(),
        _whole_bad_batch(),
        _other_units("regression other units", tasks.REGRESSION, 1e6),
        _other_units("mlp other units", tasks.MLP, 1e8),
        _unscaled_column(),
        *_words_outside(),
    ]


def _non_finite_inputs() -> list[Case]:
    unnumbered = replace(tasks.CNN, has_indices=False)
    rows: list[tuple[str, Task, str, Callable[[Tensor, random.Random], None], dict[int, int]]] = [
        ("cnn nan pixel at the first step", tasks.CNN, "images", one_value(NAN), {1: 1}),
        ("cnn nan pixel", unnumbered, "images", one_value(NAN), {27: 1}),
        ("small cnn nan pixel, late", tasks.SMALL_CNN, "images", one_value(NAN), {72: 1}),
        ("small cnn inf pixel", tasks.SMALL_CNN, "images", one_value(INF), {31: 1}),
        ("small cnn five nan images", tasks.SMALL_CNN, "images", every_value(NAN), {22: 5}),
        (
            "small cnn nan in six batches",
            tasks.SMALL_CNN,
            "images",
            one_value(NAN),
            dict.fromkeys((9, 21, 33, 50, 51, 70), 1),
        ),
        ("small cnn nan and inf", tasks.SMALL_CNN, "images", one_value(NAN, -INF), {40: 2}),
        ("norm mlp nan in a row", tasks.NORM_MLP, "rows", one_value(NAN), {18: 1}),
        ("norm mlp inf in three rows", tasks.NORM_MLP, "rows", one_value(-INF), {3: 3}),
        ("table nan in a row", tasks.TABLE, "rows", one_value(NAN), {44: 1}),
        ("rnn nan in a series", tasks.RNN, "series", one_value(NAN), {12: 1}),
        ("rnn inf in two series", tasks.RNN, "series", one_value(INF), {2: 1, 30: 1}),
        ("autoencoder -inf pixel", tasks.AUTOENCODER, "images", one_value(-INF), {25: 1}),
        ("siamese nan on the right", tasks.TWINS, "right", one_value(NAN), {33: 2}),
    ]
    cases = [
        plant_samples(
            name, task, key=key, change=change, steps=steps, seed=seed, causes=_DATA, phases=_INPUT
        )
        for seed, (name, task, key, change, steps) in enumerate(rows, start=100)
    ]
    # A target is an input of the step, and a label too.
    both = frozenset({Cause.BAD_DATA, Cause.BAD_LABEL})
    cases += [
        plant_samples(
            f"regression {name} target",
            tasks.REGRESSION,
            key="targets",
            change=every_value(value),
            steps={step: 1},
            seed=seed,
            causes=both,
            phases=frozenset({StepPhase.INPUT, StepPhase.LOSS}),
        )
        for seed, (name, value, step) in enumerate((("nan", NAN, 14), ("inf", INF, 41)), start=130)
    ]
    return cases


def _outliers() -> list[Case]:
    # Its own clipping would keep the outlier from doing harm.
    unclipped = replace(tasks.RNN, clip_norm=None)
    rows: list[tuple[str, Task, str, float, float, bool, Mapping[int, int]]] = [
        ("cnn huge pixel at the first step", tasks.CNN, "images", 1e19, 1e21, False, {1: 1}),
        ("cnn huge pixel", tasks.CNN, "images", 1e19, 1e21, False, {22: 1}),
        ("small cnn huge pixel, late", tasks.SMALL_CNN, "images", 1e10, 1e20, False, {68: 1}),
        (
            "small cnn huge pixels in two batches",
            tasks.SMALL_CNN,
            "images",
            1e8,
            1e12,
            False,
            {15: 1, 48: 1},
        ),
        ("mlp row of a trillion", tasks.MLP, "rows", 1e11, 1e13, True, {28: 1}),
        ("mlp huge number, mild", tasks.MLP, "rows", 1e6, 1e8, False, {35: 1}),
        ("regression row of -1e12", tasks.REGRESSION, "rows", -1e12, -1e12, True, {19: 1}),
        ("regression three huge rows", tasks.REGRESSION, "rows", 1e7, 1e9, True, {26: 3}),
        (
            "regression huge number at the second step",
            tasks.REGRESSION,
            "rows",
            1e9,
            1e20,
            False,
            {2: 1},
        ),
        ("rnn huge number", unclipped, "series", 1e28, 1e32, False, {17: 1}),
        ("table number beyond float32's squares", tasks.TABLE, "rows", 1e24, 1e30, False, {37: 1}),
    ]
    cases = []
    for seed, (name, task, key, low, high, is_row, steps) in enumerate(rows, start=150):
        value = log_uniform(drawing(name + "/value"), low, high)
        cases.append(
            plant_samples(
                name,
                task,
                key=key,
                change=every_value(value) if is_row else one_value(value),
                steps=steps,
                seed=seed,
                causes=_DATA,
                phases=_OUTLIER,
                modules=_ANYWHERE,
            )
        )
    cases.append(
        plant_samples(
            "regression huge target",
            tasks.REGRESSION,
            key="targets",
            change=every_value(3e14),
            steps={23: 1},
            seed=170,
            # A target is an input of the step, and a label too.
            causes=frozenset({Cause.BAD_DATA, Cause.BAD_LABEL}),
            phases=_OUTLIER,
            modules=_ANYWHERE,
        )
    )
    return cases


def _whole_bad_batch() -> Case:
    def spoil(step: int, batch: Batch) -> Batch | None:
        return (torch.full_like(batch[0], NAN), batch[1]) if step == 36 else None

    return Case(
        name="small cnn a whole batch of nan",
        task=tasks.SMALL_CNN,
        seed=180,
        fault=Fault(batch=spoil),
        expected=Expected(
            causes=_DATA,
            phases=_INPUT,
            modules=frozenset({""}),
            step=36,
            positions=frozenset(range(tasks.SMALL_CNN.batch_size)),
        ),
    )


def _other_units(name: str, task: Task, factor: float) -> Case:
    """The second file, from the 31st batch on, has one column in other units."""
    first = 30 * task.batch_size

    def spoil(train: Data) -> None:
        train["rows"][first:, 4] *= factor

    return Case(
        name=name,
        task=task,
        seed=181,
        fault=Fault(data=spoil, overrides={"is_shuffled": False}),
        expected=Expected(
            causes=_DATA,
            phases=_OUTLIER,
            step=31,
            positions=frozenset(range(task.batch_size)),
            indices=frozenset(range(first, first + task.batch_size)),
        ),
        twin={"is_shuffled": False},
    )


def _unscaled_column() -> Case:
    def spoil(train: Data) -> None:
        train["rows"][:, 7] *= 1e6

    return Case(
        name="regression a column never scaled",
        task=tasks.REGRESSION,
        seed=182,
        fault=Fault(data=spoil),
        expected=Expected(
            # No sample is odd beside the others: it is the data as a whole, or a rate (and a
            # gradient) that is too large for such data.
            causes=frozenset({Cause.BAD_DATA, Cause.LEARNING_RATE, Cause.EXPLODING_GRADIENT}),
            outcome=Outcome.EITHER,
        ),
    )


def _words_outside() -> list[Case]:
    phases = frozenset({StepPhase.INPUT, StepPhase.FORWARD})
    return [
        plant_samples(
            name,
            task,
            key="words",
            change=one_value(word),
            steps=steps,
            seed=seed,
            causes=_DATA,
            phases=phases,
            modules=frozenset({"", module}),
        )
        for seed, (name, task, word, steps, module) in enumerate(
            (
                (
                    "gru word outside the vocabulary",
                    tasks.GRU,
                    data.VOCABULARY,
                    {29: 1},
                    "embedding",
                ),
                ("transformer word -1", tasks.TAGGER, -1, {8: 1}, "words"),
            ),
            start=185,
        )
    ]
