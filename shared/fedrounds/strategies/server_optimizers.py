"""Server optimizers: they follow the pseudo-gradient, the aggregate minus the global model.

FedAdagrad, FedAdam and FedYogi are algorithm 2 of Reddi et al. 2021, "Adaptive Federated
Optimization": v begins at tau^2 and there is no bias correction, unlike in torch.optim.Adam.
Moments are computed in float64 and kept in float32 (float64 for float64 entries).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fedrounds.errors import InvalidInput
from fedrounds.strategies.components import ServerOptimizer


def fedavgm(
    *, server_lr: float = 1.0, server_momentum: float = 0.9, nesterov: bool = False
) -> ServerOptimizer:
    """SGD with momentum at the server (Hsu et al. 2019).

    "Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification":
    m = server_momentum * m + delta, and the model moves by server_lr * m; as torch.optim.SGD.

    Args:
        server_lr: step size.
        server_momentum: 0 is plain SGD.
        nesterov: 1: the model moves by server_lr * (delta + server_momentum * m).
    """
    _validate_lr(server_lr)
    _validate_share("server_momentum", server_momentum)

    def step(delta: Tensor, moments: Tensor) -> tuple[Tensor, Tensor]:
        momentum = moments.mul_(server_momentum).add_(delta[:, None])
        move = delta + server_momentum * momentum[:, 0] if nesterov else momentum[:, 0]
        return server_lr * move, momentum

    return ServerOptimizer(initial=(0.0,), step=step)


def fedadagrad(
    *, server_lr: float = 0.1, beta1: float = 0.0, tau: float = 0.001
) -> ServerOptimizer:
    """Adagrad at the server (Reddi et al. 2021): v = v + delta^2.

    Args:
        server_lr: the paper's eta.
        beta1: momentum of the pseudo-gradient.
        tau: degree of adaptivity; smaller values adapt more.
    """
    return _adaptive(
        lambda squares, v: v + squares, server_lr=server_lr, beta1=beta1, beta2=0.0, tau=tau
    )


def fedadam(
    *, server_lr: float = 0.1, beta1: float = 0.9, beta2: float = 0.99, tau: float = 0.001
) -> ServerOptimizer:
    """Adam at the server (Reddi et al. 2021): v = beta2 v + (1 - beta2) delta^2.

    Args:
        server_lr: the paper's eta.
        beta1: momentum of the pseudo-gradient.
        beta2: decay of v; larger values average over more rounds.
        tau: degree of adaptivity; smaller values adapt more.
    """
    return _adaptive(
        lambda squares, v: beta2 * v + (1 - beta2) * squares,
        server_lr=server_lr,
        beta1=beta1,
        beta2=beta2,
        tau=tau,
    )


def fedyogi(
    *, server_lr: float = 0.1, beta1: float = 0.9, beta2: float = 0.99, tau: float = 0.001
) -> ServerOptimizer:
    """Yogi at the server (Reddi et al. 2021): v = v - (1 - beta2) delta^2 sign(v - delta^2).

    Args:
        server_lr: the paper's eta.
        beta1: momentum of the pseudo-gradient.
        beta2: decay of v; larger values average over more rounds.
        tau: degree of adaptivity; smaller values adapt more.
    """
    return _adaptive(
        lambda squares, v: v - (1 - beta2) * squares * torch.sign(v - squares),
        server_lr=server_lr,
        beta1=beta1,
        beta2=beta2,
        tau=tau,
    )


def _adaptive(
    next_v: Callable[[Tensor, Tensor], Tensor],
    *,
    server_lr: float,
    beta1: float,
    beta2: float,
    tau: float,
) -> ServerOptimizer:
    """Return lines 10 to 15 of algorithm 2; `next_v` takes delta^2 and v to the next v."""
    _validate_lr(server_lr)
    _validate_share("beta1", beta1)
    _validate_share("beta2", beta2)
    if not 0 < tau < math.inf:
        raise InvalidInput(f"tau is {tau:g}; it must be above 0")

    def step(delta: Tensor, moments: Tensor) -> tuple[Tensor, Tensor]:
        m = beta1 * moments[:, 0] + (1 - beta1) * delta
        v = next_v(delta * delta, moments[:, 1])
        return server_lr * m / (v.sqrt() + tau), torch.stack([m, v], dim=1)

    return ServerOptimizer(initial=(0.0, tau**2), step=step)


def _validate_lr(server_lr: float) -> None:
    if not 0 < server_lr < math.inf:
        raise InvalidInput(f"server_lr is {server_lr:g}; it must be above 0")


def _validate_share(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise InvalidInput(f"{name} is {value:g}; it must be from 0 to below 1")
