"""Seven aggregators under seven attacks: accuracy on MNIST; writes docs/results.md.

    python -m benchmarks.attacks --data-root FOLDER [--rounds 20] [--strategies mean,krum]

A simulation in this process, not a run of the service: an attacker of the literature sees what all
others send, which no client of the service can. What is the service's own: the training, the files
of updates, and the strategies that make the next model of them. 20 clients with 600 examples each,
4 of them attackers in every round, the task two_nn of benchmarks.paper_tasks, E = 1, B = 32,
lr 0.1. What a cell found is kept in benchmarks/results/attacks.json; cells that are there already
aren't run again.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from benchmarks.federation import machine_line, write_section
from benchmarks.paper_report import PAGE, RESULTS
from benchmarks.paper_tasks import two_nn
from fedrounds.data import make_loader
from fedrounds.seeds import derive_seed
from fedrounds.strategies.blocks import Cohort, StateFile
from fedrounds.strategies.components import Strategy
from fedrounds.strategies.registry import find_strategy
from fedrounds.strategies.server_step import next_blocks
from fedrounds.tasks.task import DataRequest, Partition
from fedrounds.tensors.codec import read_layout, write_state
from fedrounds.training.evaluation import evaluate
from fedrounds.training.loop import train_model
from fedrounds.types import EntryKind

NUM_CLIENTS, NUM_ATTACKERS = 20, 4
_NUM_PARTITIONS = 100
_BATCH_SIZE, _LR = 32, 0.1
_ALIE_DEVIATIONS = 1.5
_SIGN_FACTOR = 5.0
_RECORD = RESULTS / "attacks.json"

Vectors = Tensor
"""One model's parameters in a row, or one row for each client: float32 [.., num_parameters]."""

Attack = Callable[[Vectors, Vectors, torch.Generator], Vectors]
"""(honest deltas of the others, the attackers' own, generator) -> what the attackers send."""

STRATEGIES: Mapping[str, tuple[str, Mapping[str, float]]] = MappingProxyType(
    {
        "mean": ("uniform", {}),
        "median": ("median", {}),
        "trimmed mean": ("trimmed-mean", {"trim": NUM_ATTACKERS / NUM_CLIENTS}),
        "Krum": ("krum", {"f": NUM_ATTACKERS}),
        "Multi-Krum": ("multi-krum", {"f": NUM_ATTACKERS}),
        "Bulyan": ("bulyan", {"f": NUM_ATTACKERS}),
        "geometric median": ("geometric-median", {}),
    }
)


def _as_they_are(_: Vectors, own: Vectors, __: torch.Generator) -> Vectors:
    return own


def _flip_signs(_: Vectors, own: Vectors, __: torch.Generator) -> Vectors:
    return -_SIGN_FACTOR * own


def _draw_noise(_: Vectors, own: Vectors, generator: torch.Generator) -> Vectors:
    return torch.randn(own.shape, generator=generator)


def _a_little_is_enough(honest: Vectors, own: Vectors, _: torch.Generator) -> Vectors:
    """Baruch et al. 2019, "A Little Is Enough": the mean less some standard deviations."""
    moved: Vectors = honest.mean(0) - _ALIE_DEVIATIONS * honest.std(0)
    return moved.expand_as(own)


def _inner_product(factor: float) -> Attack:
    """Xie et al. 2020, "Fall of Empires": minus the mean of the honest, times a factor."""

    def attack(honest: Vectors, own: Vectors, _: torch.Generator) -> Vectors:
        return (-factor * honest.mean(0)).expand_as(own)

    return attack


ATTACKS: Mapping[str, Attack] = MappingProxyType(
    {
        "none": _as_they_are,
        "sign flip": _flip_signs,
        "Gaussian": _draw_noise,
        # The attackers train on 9 minus each label, and send that as it is.
        "label flip": _as_they_are,
        "ALIE": _a_little_is_enough,
        "inner product 0.5": _inner_product(0.5),
        "inner product 5": _inner_product(5),
    }
)


def main() -> None:
    """Fill the cells that are missing, and write the table after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-root", type=Path, required=True, help="where full MNIST is")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--strategies", default=",".join(STRATEGIES))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    record: dict[str, dict[str, float]] = {}
    if _RECORD.exists():
        record = json.loads(_RECORD.read_text())["accuracies"]
    shares = [_share(arguments.data_root, index) for index in range(NUM_CLIENTS)]
    test = two_nn.load_test(arguments.data_root)
    assert isinstance(test, TensorDataset)
    for name in arguments.strategies.split(","):
        for attack in ATTACKS:
            if attack in record.setdefault(name, {}):
                continue
            began = time.monotonic()
            accuracy = _run(name, attack, shares, test, num_rounds=arguments.rounds)
            record[name][attack] = accuracy
            print(
                f"{name}, {attack}: {accuracy:.4f} ({time.monotonic() - began:.0f} s)",
                file=sys.stderr,
            )
            _keep(record, num_rounds=arguments.rounds)


def _share(data_root: Path, index: int) -> TensorDataset:
    partition = Partition(num_partitions=_NUM_PARTITIONS, index=index, seed=0)
    share = two_nn.load_train(DataRequest(data_root=data_root, partition=partition))
    assert isinstance(share, TensorDataset)
    return share


def _run(
    name: str, attack: str, shares: Sequence[TensorDataset], test: TensorDataset, *, num_rounds: int
) -> float:
    """Return the last model's accuracy on the test set; the last clients are the attackers."""
    strategy_name, parameters = STRATEGIES[name]
    strategy = find_strategy(strategy_name, parameters)
    torch.manual_seed(derive_seed(0, "init"))
    model = two_nn.build_model()
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    first_bad = NUM_CLIENTS - NUM_ATTACKERS
    for round_number in range(1, num_rounds + 1):
        deltas = []
        for client_id, share in enumerate(shares):
            if attack == "label flip" and client_id >= first_bad:
                images, labels = share.tensors
                share = TensorDataset(images, 9 - labels)  # noqa: PLW2901
            deltas.append(_train(state, share, round_number, client_id))
        honest, own = torch.stack(deltas[:first_bad]), torch.stack(deltas[first_bad:])
        seed = derive_seed(0, "attack", round_number=round_number)
        generator = torch.Generator().manual_seed(seed)
        sent = torch.cat([honest, ATTACKS[attack](honest, own, generator)])
        state = _aggregated(strategy, state, sent)
    model.load_state_dict(state)
    loader = make_loader(test, batch_size=1000, shuffle=False)
    accuracy = evaluate(model, loader, two_nn.loss, torch.device("cpu")).accuracy
    assert accuracy is not None
    return accuracy


def _train(
    state: Mapping[str, Tensor], share: TensorDataset, round_number: int, client_id: int
) -> Vectors:
    """Return a client's delta, float32 [num_parameters]."""
    model = two_nn.build_model()
    model.load_state_dict(state)
    seed = derive_seed(0, "batches", round_number=round_number, client_id=client_id)
    loader = make_loader(share, batch_size=_BATCH_SIZE, seed=seed)
    trained = train_model(model, loader, epochs=1, lr=_LR, momentum=0.0).state_dict
    return _in_a_row(trained) - _in_a_row(state)


def _aggregated(
    strategy: Strategy, state: Mapping[str, Tensor], deltas: Vectors
) -> dict[str, Tensor]:
    """Return the next model by way of files, as the server makes it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def written(number: int, content: Mapping[str, Tensor]) -> StateFile:
            path = folder / f"{number:03}"
            write_state(path, content)
            return StateFile(path=path, layout=read_layout(path), num_examples=1)

        base = _in_a_row(state)
        updates = [
            written(number, _as_state(base + delta, state))
            for number, delta in enumerate(deltas, start=1)
        ]
        cohort = Cohort(
            base=written(0, state), updates=updates, kinds=dict.fromkeys(state, EntryKind.PARAMETER)
        )
        parts: dict[str, list[Tensor]] = {key: [] for key in state}
        for result in next_blocks(strategy, cohort):
            parts[result.block.name].append(result.values)
    return {key: torch.cat(parts[key]).view_as(tensor) for key, tensor in state.items()}


def _in_a_row(state: Mapping[str, Tensor]) -> Vectors:
    return torch.cat([tensor.flatten() for tensor in state.values()])


def _as_state(row: Vectors, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    parts = torch.split(row, [tensor.numel() for tensor in like.values()])
    return {key: part.view_as(like[key]) for key, part in zip(like, parts, strict=True)}


def _keep(accuracies: Mapping[str, Mapping[str, float]], *, num_rounds: int) -> None:
    RESULTS.mkdir(exist_ok=True)
    machine = machine_line()
    _RECORD.write_text(
        json.dumps({"rounds": num_rounds, "machine": machine, "accuracies": accuracies}, indent=1)
        + "\n"
    )
    lines = [
        f"Accuracy (%) after {num_rounds} rounds, seed 0; below the one without an attack by more",
        "than 3 points: in bold. `python -m benchmarks.attacks --data-root FOLDER "
        f"--rounds {num_rounds}`.",
        "",
        f"| | {' | '.join(ATTACKS)} |",
        f"| --- |{' --- |' * len(ATTACKS)}",
    ]
    for name, by_attack in accuracies.items():
        cells = []
        for attack in ATTACKS:
            text = f"{100 * by_attack[attack]:.1f}" if attack in by_attack else ""
            falls = attack in by_attack and by_attack[attack] < by_attack["none"] - 0.03
            cells.append(f"**{text}**" if falls else text)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    write_section("attacks", "\n".join([*lines, "", machine]), page=PAGE)


if __name__ == "__main__":
    main()
