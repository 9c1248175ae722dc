"""Whom the norm band excludes: honest clients never, and which attackers.

    nice -n 19 python -m benchmarks.honest_federations [--rounds 200] [--only WORD] [--seed N]
    nice -n 19 python -m benchmarks.honest_federations --attacks [--rounds 60] [--seed N]

The federations are those of benchmarks.small_federations. Without --seed the operating system
draws the seed of partitions, sizes, first weights, batches and partial work, and the result records
it. With --write the table of honest federations goes into docs/results.md.
"""

import argparse
import functools
import secrets
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from benchmarks.federation import machine_line, write_section
from benchmarks.paper_report import PAGE
from benchmarks.small_federations import Attack, Federation, Judged, Simulation

_PLAIN = {"momentum": 0.0}
_UNEVEN: Mapping[str, Any] = MappingProxyType(
    {"num_clients": 4, "ratio": 30, "smallest": 4, "num_labels": 2}
)
_HUNDREDFOLD: Mapping[str, Any] = MappingProxyType({"ratio": 100, "smallest": 2})

HONEST: Sequence[Federation] = (
    Federation(name="3 alike", num_clients=3),
    Federation(name="4 alike, logistic", num_clients=4, task="synthetic"),
    Federation(name="4 alike, lr 0.5", num_clients=4, settings={**_PLAIN, "lr": 0.5, "epochs": 5}),
    Federation(
        name="5, one with 20 times", num_clients=5, smallest=20, ratio=20, is_one_large=True
    ),
    Federation(name="4, 1:100", num_clients=4, **_HUNDREDFOLD),
    Federation(name="5, 1:100, two labels", num_clients=5, num_labels=2, **_HUNDREDFOLD),
    Federation(
        name="5, one with 100 times, two labels, lr 0.003",
        num_clients=5,
        num_labels=2,
        is_one_large=True,
        **_HUNDREDFOLD,
        settings={**_PLAIN, "lr": 0.003},
    ),
    Federation(
        name="5, one with 100 times, lr 0.3",
        num_clients=5,
        is_one_large=True,
        **_HUNDREDFOLD,
        settings={**_PLAIN, "lr": 0.3},
    ),
    Federation(name="10, one label", num_clients=10, num_labels=1),
    Federation(
        name="5, two labels, lr 0.3, 5 epochs",
        num_clients=5,
        num_labels=2,
        settings={**_PLAIN, "lr": 0.3, "epochs": 5},
    ),
    Federation(
        name="10, 1:100, two labels, partial work, lr 0.1",
        num_clients=10,
        num_labels=2,
        is_partial=True,
        **_HUNDREDFOLD,
        settings={**_PLAIN, "lr": 0.1},
    ),
    Federation(
        name="4, 1:30, two labels, stragglers",
        **_UNEVEN,
        settings={"epochs": 5, "stragglers": 0.5},
    ),
    Federation(
        name="30, 1:100, two labels, 6 a round",
        num_clients=30,
        num_labels=2,
        **_HUNDREDFOLD,
        settings={"clients_per_round": 6},
    ),
    Federation(
        name="30, 1:10, logistic, lr 0.01",
        num_clients=30,
        task="synthetic",
        smallest=4,
        ratio=10,
        settings={**_PLAIN, "lr": 0.01},
    ),
    Federation(
        name="100, 1:100, two labels, 6 a round",
        num_clients=100,
        num_labels=2,
        smallest=1,
        ratio=100,
        settings={"clients_per_round": 6},
    ),
    Federation(name="6, inputs scaled by 1/3 to 3", num_clients=6, input_scale=3.0),
    Federation(name="6, one mislabelled", num_clients=6, num_mislabelled=1),
    Federation(
        name="60, one with labels of its own, 6 a round, lr 0.1",
        num_clients=60,
        num_apart=1,
        settings={**_PLAIN, "lr": 0.1, "epochs": 3, "clients_per_round": 6},
    ),
    *(
        Federation(
            name=f"4, 1:30, two labels, {strategy}",
            **_UNEVEN,
            settings={**_PLAIN, "lr": 0.05, "strategy": strategy},
        )
        for strategy in ("uniform+fedprox", "scaffold", "uniform+feddyn", "ditto", "fednova")
    ),
    *(
        Federation(
            name=f"4, 1:30, two labels, BatchNorm, {strategy}",
            task="batchnorm",
            **_UNEVEN,
            settings={"strategy": strategy},
        )
        for strategy in ("fedavg", "fedbn")
    ),
    Federation(
        name="20, 1:30, two labels, fedbuff",
        num_clients=20,
        smallest=4,
        ratio=30,
        num_labels=2,
        settings={"strategy": "fedbuff", "strategy_parameters": {"buffer_size": 5}},
    ),
    *(
        Federation(name=f"4, 1:30, two labels, {what}", **_UNEVEN, settings=settings)
        for what, settings in (
            ("top-k of 1 %", {"compression": "top-k", "compression_fraction": 0.01}),
            ("int8", {"compression": "int8"}),
            ("cosine, lr 0.1", {"schedule": "cosine", "warmup_epochs": 20, "lr": 0.1}),
            ("Adam", {"optimizer": "adam", "lr": 0.003}),
            (
                "fedadam",
                {"strategy": "fedavg+fedadam", "strategy_parameters": {"server_lr": 0.03}},
            ),
        )
    ),
    Federation(
        name="100, 1:10, two labels, 50 a round",
        num_clients=100,
        num_labels=2,
        smallest=4,
        ratio=10,
        settings={"epochs": 1, "clients_per_round": 50},
    ),
)

_QUICK = {"lr": 0.1, "batch_size": 16}

ATTACKED: Sequence[Federation] = (
    Federation(name="5 alike", num_clients=5, smallest=60, settings=_QUICK),
    Federation(
        name="10, 1:10, two labels",
        num_clients=10,
        smallest=12,
        ratio=10,
        num_labels=2,
        settings=_QUICK,
    ),
)

CLAIM = 100


def _scaled(_: Tensor, own: Tensor, __: torch.Generator) -> Tensor:
    return own * 30


def _noise(_: Tensor, own: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(own.shape, generator=generator)
    lengths: Tensor = own.norm(dim=1, keepdim=True) / noise.norm(dim=1, keepdim=True)
    return 10 * lengths * noise


def _a_little_is_enough(honest: Tensor, own: Tensor, _: torch.Generator) -> Tensor:
    """Baruch et al. 2019, "A Little Is Enough": the mean less 1.5 standard deviations."""
    return (honest.mean(0) - 1.5 * honest.std(0)).expand_as(own)


def _inner_product(factor: float) -> Callable[[Tensor, Tensor, torch.Generator], Tensor]:
    """Xie et al. 2020, "Fall of Empires": minus the mean of the honest, times a factor."""

    def change(honest: Tensor, own: Tensor, _: torch.Generator) -> Tensor:
        return (-factor * honest.mean(0)).expand_as(own)

    return change


ATTACKS: Mapping[str, Attack | None] = MappingProxyType(
    {
        "none": None,
        "one, times 30": Attack(share=0, change=_scaled),
        "one, noise of 10 times its norm": Attack(share=0, change=_noise),
        f"one, times 30, claims {CLAIM} times the examples": Attack(
            share=0, change=_scaled, claim=CLAIM
        ),
        f"one, noise, claims {CLAIM} times the examples": Attack(
            share=0, change=_noise, claim=CLAIM
        ),
        "a fifth, ALIE": Attack(share=0.2, change=_a_little_is_enough),
        "a fifth, inner product, 0.5": Attack(share=0.2, change=_inner_product(0.5)),
        "a fifth, inner product, 5": Attack(share=0.2, change=_inner_product(5)),
    }
)

DEFENCES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "no band": {"norm_band": 0},
        "default": {},
        "uniform": {"strategy": "uniform"},
        "median": {"strategy": "median"},
    }
)


def main() -> None:
    """Play the federations, and print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--attacks", action="store_true", help="attackers instead of honest ones")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--only", default="", help="federations with this word in their name")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--jobs", type=int, default=1, help="processes at work at the same time")
    parser.add_argument(
        "--write",
        action="store_true",
        help="write the table of honest federations into docs/results.md",
    )
    arguments = parser.parse_args()
    seed = secrets.randbits(32) if arguments.seed is None else arguments.seed
    print(f"seed {seed}", file=sys.stderr, flush=True)
    given = {"seed": seed, "num_rounds": arguments.rounds}
    if arguments.attacks:
        columns = ["clients", "attack", "attacks excluded", "honest excluded", *DEFENCES]
        calls = [
            functools.partial(_attacked_row, federation, attack, **given)
            for federation in ATTACKED
            for attack in ATTACKS
        ]
    else:
        columns = ["clients", "updates", "excluded", "beyond half the band"]
        calls = [
            functools.partial(_honest_row, federation, **given)
            for federation in HONEST
            if arguments.only in federation.name
        ]
    lines = [f"| {' | '.join(columns)} |", "|" + " --- |" * len(columns)]
    # Forked processes would inherit torch's threads.
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        for line in pool.map(_call, calls):
            print(line, file=sys.stderr, flush=True)
            lines.append(line)
    command = f"python -m benchmarks.honest_federations --rounds {arguments.rounds} --seed {seed}"
    if arguments.attacks:
        command += " --attacks"
    text = "\n".join([*lines, "", f"`{command}`; {machine_line()}"])
    print(text)
    if arguments.write and not arguments.attacks:
        write_section("honest-federations", text, page=PAGE)


def _call(function: Callable[[], str]) -> str:
    return function()


def _honest_row(federation: Federation, *, seed: int, num_rounds: int) -> str:
    """Return how many honest updates a federation's rounds excluded, as a row of a table."""
    judged, _ = _played(federation, seed=seed, num_rounds=num_rounds)
    excluded, beyond_half = (
        sum(update.is_excluded for update in judged),
        sum(update.is_beyond_half for update in judged),
    )
    return f"| {federation.name} | {len(judged)} | {excluded} | {beyond_half} |"


def _attacked_row(federation: Federation, name: str, *, seed: int, num_rounds: int) -> str:
    """Return the exclusions under an attack, and the accuracy reached, as a row of a table."""
    cells = []
    counts = ""
    for defence, settings in DEFENCES.items():
        judged, accuracy = _played(
            federation.with_settings(settings),
            seed=seed,
            num_rounds=num_rounds,
            attack=ATTACKS[name],
        )
        cells.append(f"{100 * accuracy:.1f}")
        if defence == "default":
            bad = [update.is_excluded for update in judged if update.is_attack]
            good = [update.is_excluded for update in judged if not update.is_attack]
            counts = f"{sum(bad)} of {len(bad)} | {sum(good)} of {len(good)}"
    return f"| {federation.name} | {name} | {counts} | {' | '.join(cells)} |"


def _played(
    federation: Federation, *, seed: int, num_rounds: int, attack: Attack | None = None
) -> tuple[list[Judged], float]:
    """Return all updates of a federation's rounds as they were judged, and the accuracy reached."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        simulation = Simulation(
            federation, Path(folder), seed=seed, num_rounds=num_rounds, attack=attack
        )
        judged = [update for of_round in simulation.play() for update in of_round]
        accuracy = 0.0 if federation.task == "synthetic" else simulation.accuracy()
    return judged, accuracy


if __name__ == "__main__":
    main()
