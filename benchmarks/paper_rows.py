"""What benchmarks.papers runs: one row for each published figure, and its settings."""

from collections.abc import Sequence
from dataclasses import dataclass

# What would make the run another one than the paper's: nothing is adjusted or rolled back, no
# training is cured, and a round waits for all it asked.
_AS_IN_PAPERS = (
    *("--max-adjustments", "0", "--max-rollbacks", "0"),
    *("--keep-rounds", "2", "--lease", "600"),
)
CLIENT_FLAGS = ("--doctor", "off")


@dataclass(frozen=True)
class Table:
    """Rows of one paper; `name` marks its place in docs/results.md."""

    name: str
    title: str


_FEDPROX = Table(
    "fedprox",
    "Accuracy after 100 rounds; 1000 clients, ten in a round, nine of these stragglers.",
)
_MCMAHAN = Table("mcmahan", "Rounds until the target; 100 clients, of which each round asks ten.")
_FEDBUFF = Table(
    "fedbuff",
    "Seconds until 97 %; ten clients of 6,000 examples (2NN, E = 1, B = 64, lr 0.1), each step of "
    "which takes 10 to 100 ms more, evenly in the logarithm.",
)
_COMPRESSION = Table(
    "compression",
    "Accuracy after 30 rounds; 2NN, 10 clients (class-dirichlet, alpha = 0.5), E = 1, B = 64, "
    "lr 0.1.",
)
_NIID = Table("niid", "Accuracy after 50 rounds; 10 clients, E = 10, B = 64, all in every round.")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One published figure.

    `paper` is the number of rounds that `target` (an accuracy) took there; without a target it is
    the accuracy after `rounds`, or None if we have no figure to compare with. `flags` are the
    server's, beside those of every row. With `step_s` each client is a process of its own in which
    a training step takes so many seconds more, and what is told is the seconds until the target.
    """

    name: str
    table: Table
    what: str
    paper: float | None
    target: float | None = None
    rounds: int
    num_clients: int
    flags: Sequence[str]
    num_seeds: int = 1
    step_s: Sequence[float] = ()

    @property
    def goal(self) -> str:
        """The paper's figure in words."""
        if self.paper is None:
            return "-"
        return f"{self.paper:g}" if self.target else f"{self.paper:.2%}"

    def server_flags(self, seed: int) -> list[str]:
        """Return all that makes the run this run, but where its data and its state are."""
        return [
            *("--rounds", str(self.rounds), "--seed", str(seed)),
            *("--num-partitions", str(self.num_clients), "--min-clients", str(self.num_clients)),
            *self.flags,
            *_AS_IN_PAPERS,
            # An asynchronous round is whatever comes first.
            *(() if "fedbuff" in self.flags else ("--require-all",)),
        ]


def _mcmahan(
    name: str,
    what: str,
    *,
    paper: float,
    target: float,
    rounds: int,
    task: str,
    flags: Sequence[str],
    num_seeds: int = 1,
) -> Row:
    return Row(
        name=name,
        table=_MCMAHAN,
        what=what,
        paper=paper,
        target=target,
        rounds=rounds,
        num_clients=100,
        flags=(
            *("--task", f"benchmarks.paper_tasks:{task}"),
            *("--clients-per-round", "10", "--min-updates", "10"),
            *("--batch-size", "10", "--momentum", "0", *flags),
        ),
        num_seeds=num_seeds,
    )


def _niid(
    name: str, what: str, *, flags: Sequence[str], strategy: str, paper: float | None = None
) -> Row:
    return Row(
        name=f"niid-{name}-{strategy}",
        table=_NIID,
        what=f"{strategy}, {what}",
        paper=paper,
        rounds=50,
        num_clients=10,
        flags=(
            *("--task", "benchmarks.paper_tasks:lenet", "--epochs", "10", "--batch-size", "64"),
            *("--lr", "0.01", "--momentum", "0.9", "--strategy", strategy, *flags),
        ),
    )


def _fedprox(name: str, what: str, *, paper: float, flags: Sequence[str]) -> Row:
    return Row(
        name=name,
        table=_FEDPROX,
        what=what,
        paper=paper,
        rounds=100,
        num_clients=1000,
        flags=(
            *("--task", "benchmarks.paper_tasks:logistic", "--epochs", "20", "--batch-size", "10"),
            *("--lr", "0.03", "--momentum", "0", "--clients-per-round", "10", "--min-updates", "1"),
            *("--cohort", "data-size", "--stragglers", "0.9", *flags),
        ),
        num_seeds=3,
    )


def _fedbuff(name: str, what: str, *, flags: Sequence[str]) -> Row:
    return Row(
        name=name,
        table=_FEDBUFF,
        what=what,
        paper=None,
        target=0.97,
        rounds=150,
        num_clients=10,
        flags=(
            *("--task", "benchmarks.paper_tasks:slow_two_nn", "--epochs", "1"),
            *("--batch-size", "64", "--lr", "0.1", "--momentum", "0", *flags),
        ),
        num_seeds=3,
        step_s=tuple(round(0.01 * 10 ** (number / 9), 4) for number in range(10)),
    )


def _compression(name: str, what: str, *flags: str) -> Row:
    return Row(
        name=f"compression-{name}",
        table=_COMPRESSION,
        what=what,
        paper=None,
        rounds=30,
        num_clients=10,
        flags=(
            *("--task", "benchmarks.paper_tasks:two_nn", "--epochs", "1", "--batch-size", "64"),
            *("--lr", "0.1", "--momentum", "0", *_DIRICHLET, *flags),
        ),
        num_seeds=3,
    )


_DIRICHLET = ("--partition", "class-dirichlet", "--alpha", "0.5")
_TWO_LABELS = ("--partition", "classes", "--classes-per-client", "2")
_IID, _SHARDS = ("--partition", "iid"), ("--partition", "shards", "--shards-per-client", "2")

ROWS = (
    _mcmahan(
        "2nn-iid",
        "2NN, IID, E = 1, B = 10, 97 %",
        paper=87,
        target=0.97,
        rounds=150,
        task="two_nn",
        flags=("--epochs", "1", "--lr", "0.1", *_IID),
        num_seeds=3,
    ),
    _mcmahan(
        "2nn-noniid",
        "2NN, two shards a client, E = 1, B = 10, 97 %",
        paper=664,
        target=0.97,
        rounds=900,
        task="two_nn",
        flags=("--epochs", "1", "--lr", "0.05", *_SHARDS),
        num_seeds=3,
    ),
    _mcmahan(
        "cnn-e1",
        "CNN, IID, E = 1, B = 10, 99 %",
        paper=34,
        target=0.99,
        rounds=70,
        task="wide_cnn",
        flags=("--epochs", "1", "--lr", "0.1", *_IID),
    ),
    _mcmahan(
        "cnn-e5",
        "CNN, IID, E = 5, B = 10, 99 %",
        paper=20,
        target=0.99,
        rounds=40,
        task="wide_cnn",
        flags=("--epochs", "5", "--lr", "0.1", *_IID),
    ),
    _niid("dirichlet", "alpha = 0.5", flags=_DIRICHLET, strategy="fedavg", paper=0.9889),
    _niid("dirichlet", "alpha = 0.5", flags=_DIRICHLET, strategy="fedprox"),
    _niid("dirichlet", "alpha = 0.5", flags=_DIRICHLET, strategy="scaffold"),
    _niid("dirichlet", "alpha = 0.5", flags=_DIRICHLET, strategy="fednova"),
    _niid("two-labels", "2 labels", flags=_TWO_LABELS, strategy="fedavg", paper=0.9686),
    _niid("two-labels", "2 labels", flags=_TWO_LABELS, strategy="fedprox"),
    _niid("two-labels", "2 labels", flags=_TWO_LABELS, strategy="scaffold"),
    _niid("two-labels", "2 labels", flags=_TWO_LABELS, strategy="fednova"),
    _fedprox(
        "fedprox-dropped",
        "stragglers dropped",
        paper=0.64,
        flags=("--strategy", "uniform", "--straggler-work", "none"),
    ),
    _fedprox(
        "fedprox-partial",
        "their partial work kept, mu = 0",
        paper=0.80,
        flags=("--strategy", "uniform+fedprox", "--strategy-parameters", "mu=0"),
    ),
    _fedprox(
        "fedprox-mu2",
        "their partial work kept, mu = 2",
        paper=0.85,
        flags=("--strategy", "uniform+fedprox", "--strategy-parameters", "mu=2"),
    ),
    _fedbuff("fedbuff-sync", "synchronous: FedAvg", flags=("--strategy", "fedavg")),
    _fedbuff(
        "fedbuff-async",
        "FedBuff, a buffer of 5",
        flags=("--strategy", "fedbuff", "--strategy-parameters", "buffer_size=5"),
    ),
    _compression("none", "whole updates"),
    _compression("float16", "half of the bytes", "--compression", "float16"),
    _compression("int8", "a quarter", "--compression", "int8"),
    _compression("top-k", "0.075: the largest 20th of the values", "--compression", "top-k"),
    _compression(
        *("top-k-1", "0.015: the largest 100th"),
        *("--compression", "top-k", "--compression-fraction", "0.01"),
    ),
)


def find_rows(names: Sequence[str]) -> list[Row]:
    """Return the rows with these names, in their order.

    Raises:
        ValueError: one of them isn't there.
    """
    by_name = {row.name: row for row in ROWS}
    if unknown := [name for name in names if name not in by_name]:
        raise ValueError(f"there is no row {unknown[0]!r}; there are: {', '.join(by_name)}")
    return [by_name[name] for name in names]
