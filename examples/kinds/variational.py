"""A variational autoencoder: two losses, whose sum is minimised; noise comes from torch alone."""

import torch
from torch import Tensor, nn

from examples.kinds import seed_of
from examples.kinds.autoencoder import draw
from fedrounds import Task


class VariationalAutoencoder(nn.Module):
    """Takes points [n, 8] to (reconstruction [n, 8], mean [n, 2], log variance [n, 2])."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(8, 4), nn.Linear(2, 8)

    def forward(self, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Encode, draw (in training) and decode."""
        mean, log_variance = self.encoder(points).chunk(2, dim=1)
        noise = torch.randn_like(mean) if self.training else 0.0
        return self.decoder(mean + noise * (0.5 * log_variance).exp()), mean, log_variance


def training_step(model: nn.Module, batch: list[Tensor]) -> dict[str, Tensor]:
    """Return the negative evidence lower bound and its parts, for a variance of 0.1."""
    rebuilt, mean, log_variance = model(batch[0])
    error = (rebuilt - batch[0]).square().sum(1).mean() / 0.2
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean()
    return {"loss": error + divergence, "error": error, "divergence": divergence}


task = Task(
    name="variational",
    build_model=VariationalAutoencoder,
    load_train=lambda request: draw(seed_of(request)),
    load_test=lambda _: draw(0),
    training_step=training_step,
)
