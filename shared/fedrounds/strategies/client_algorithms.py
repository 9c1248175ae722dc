"""Client algorithms other than plain training, with their parts at the server.

fedclient.client_algorithms holds the parts at the client. The server's state of an algorithm is
explicit, like that of a server optimizer: a file beside each model, verified and rolled back with
it.
"""

import math
from collections.abc import Callable, Mapping

from torch import Tensor, nn

from fedrounds.errors import InvalidInput
from fedrounds.strategies.components import (
    ClientAlgorithm,
    ServerOptimizer,
    StrategySettings,
    UnfitCohort,
)
from fedrounds.tensors.entries import norm_entries
from fedrounds.types import ClientAlgorithmConfig, EntryKind


def fedprox(*, mu: float = 0.01) -> ClientAlgorithm:
    """Pull clients towards the global model (Li et al. 2020, algorithm 2).

    "Federated Optimization in Heterogeneous Networks": a client minimises its loss plus
    mu / 2 * |w - w_global|^2, and may stop early (--work-deadline, --stragglers). The paper weights
    all updates of a cohort the same: uniform+fedprox with --cohort data-size.

    Args:
        mu: strength of the pull; 0 is fedavg. The paper tries 0.001, 0.01, 0.1 and 1.
    """
    if not 0 <= mu < math.inf:
        raise InvalidInput(f"mu is {mu:g}; it must be 0 or more")
    return ClientAlgorithm(
        config=ClientAlgorithmConfig(name="fedprox", parameters={"mu": mu}),
        not_behind={
            "fednova": "it divides by the norm of the effective local steps of plain SGD, and "
            "fedprox's pull makes that smaller the more steps there are"
        },
    )


def scaffold(
    *, server_lr: float = 1.0, num_clients: int = 0, settings: StrategySettings
) -> ClientAlgorithm:
    """Correct client drift by control variates (Karimireddy et al. 2020).

    "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", algorithm 1 with option II:
    a client adds c - c_i to each gradient, and c_i becomes c_i - c + (x - y_i) / (K lr), the mean
    of its own gradients. The model moves by server_lr times the mean delta, c by |S| / num_clients
    times the mean change of c_i. The paper is for plain SGD; with momentum or a schedule, K lr is
    the distance that a constant gradient of 1 would have moved y_i, so c_i is still a mean of
    gradients.

    Args:
        server_lr: the paper's eta_g.
        num_clients: the paper's N, the number of all clients; 0: --num-partitions.
        settings: the run's; the local optimizer must be SGD.
    """
    if settings.optimizer != "sgd":
        raise InvalidInput(
            "strategy scaffold corrects the gradients of local SGD, but --optimizer is "
            f"{settings.optimizer}, which would take them apart; give --optimizer sgd"
        )
    _validate_positive("server_lr", server_lr)
    share = _share_of(num_clients, settings, what="scaffold")

    def step(delta: Tensor, control: Tensor) -> tuple[Tensor, Tensor]:
        return server_lr * delta, control

    return ClientAlgorithm(
        config=ClientAlgorithmConfig(name="scaffold"),
        server_optimizer=lambda _: ServerOptimizer(initial=(0.0,), step=step),
        control_share=share,
        needs_whole_model=True,
        only_behind=frozenset({"fedavg", "uniform"}),
    )


def feddyn(
    *, alpha: float = 0.01, num_clients: int = 0, settings: StrategySettings
) -> ClientAlgorithm:
    """Align the clients' minima by dynamic regularisation (Acar et al. 2021, algorithm 1).

    "Federated Learning Based on Dynamic Regularization": a client minimises its loss minus
    <g_k, w> plus alpha / 2 * |w - w_global|^2, and g_k becomes g_k - alpha (w_k - w_global). At the
    server h becomes h - alpha / num_clients * (the sum of the deltas), the mean of all clients' g_k
    as long as all count the same, and the model is the mean of the w_k minus h / alpha.

    Args:
        alpha: the paper's alpha; it tries 0.001, 0.01, 0.03 and 0.1.
        num_clients: the paper's m, the number of all clients; 0: --num-partitions.
        settings: the run's.
    """
    _validate_positive("alpha", alpha)
    share = _share_of(num_clients, settings, what="feddyn")

    def optimizer(num_updates: int) -> ServerOptimizer:
        part = share(num_updates)

        def step(delta: Tensor, moments: Tensor) -> tuple[Tensor, Tensor]:
            h = moments - alpha * part * delta[:, None]
            return delta - h[:, 0] / alpha, h

        return ServerOptimizer(initial=(0.0,), step=step)

    return ClientAlgorithm(
        config=ClientAlgorithmConfig(name="feddyn", parameters={"alpha": alpha}),
        server_optimizer=optimizer,
        needs_whole_model=True,
        only_behind=frozenset({"uniform"}),
    )


def fedbn() -> ClientAlgorithm:
    """Each client keeps its normalisation layers (Li et al. 2021, algorithm 1).

    "FedBN: Federated Learning on Non-IID Features via Local Batch Normalization". All entries of
    batch, instance, group and layer norms are the client's own: never sent, never averaged; the
    global model keeps its first values. The metric personal_accuracy says how good a client's model
    is on its own examples. The server can't evaluate these models, so its evaluation never takes a
    round back.
    """
    return ClientAlgorithm(
        config=ClientAlgorithmConfig(name="fedbn"), keeps_entries_local=True, needs_norms=True
    )


def ditto(*, strength: float = 0.1) -> ClientAlgorithm:
    """Each client trains a personal model beside the global model (Li et al. 2021, algorithm 1).

    "Ditto: Fair and Robust Federated Learning Through Personalization": after training the global
    model, a client trains its personal model for as many epochs, pulled towards the global model by
    strength / 2 * |v - w_global|^2. The personal model begins as the first global model that the
    client gets, and never leaves the client. The metric personal_accuracy says how good it is on
    the client's own examples.

    Args:
        strength: the paper's lambda, which tries 0.05, 0.1, 0.2 and 1, 2.
    """
    _validate_positive("strength", strength)
    return ClientAlgorithm(
        config=ClientAlgorithmConfig(name="ditto", parameters={"strength": strength})
    )


def validate_model(
    algorithm: ClientAlgorithm | None, model: nn.Module, kinds: Mapping[str, EntryKind]
) -> None:
    """Refuse a task's model, with entries of these kinds, that a client algorithm can't train.

    Raises:
        InvalidInput: the model has no normalisation layers, or the server doesn't aggregate all of
            its parameters, and the algorithm needs that.
    """
    if algorithm is not None and algorithm.needs_norms and not norm_entries(model):
        raise InvalidInput(
            f"strategy {algorithm.config.name} keeps normalisation layers at the clients, but the "
            "task's model has none; with another strategy nothing is lost"
        )
    if algorithm is not None and algorithm.needs_whole_model:
        parameters = [
            name for name, tensor in model.named_parameters() if tensor.is_floating_point()
        ]
        if left_out := [name for name in parameters if kinds[name] is not EntryKind.PARAMETER]:
            raise InvalidInput(
                f"strategy {algorithm.config.name} corrects the gradient of each parameter by what "
                f"the server knows of it, but the task declares parameter {left_out[0]!r} "
                f"{kinds[left_out[0]]}; take another strategy, or let the server aggregate it"
            )


def _share_of(num_clients: int, settings: StrategySettings, *, what: str) -> Callable[[int], float]:
    """Return a function from the number of updates to their share of all clients."""
    total = num_clients or settings.num_partitions
    if total < 1:
        raise InvalidInput(
            f"strategy {what} must know how many clients there are in all; give "
            "--strategy-parameters num_clients=..."
        )

    def share(num_updates: int) -> float:
        if num_updates > total:
            raise UnfitCohort(
                f"{what} expects {total} clients in all, but {num_updates} sent updates; "
                "give --strategy-parameters num_clients=..."
            )
        return num_updates / total

    return share


def _validate_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise InvalidInput(f"{name} is {value:g}; it must be above 0")
