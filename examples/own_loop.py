"""A training loop of one's own with the doctor in it, without any federation.

    python examples/own_loop.py

Three of the readings hold a NaN, as from a sensor that failed. A plain loop would end with loss
nan; this one says which readings, proves it, leaves them out and goes on.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

ROOT = Path(__file__).resolve().parent.parent
# Run by its path, a script sees its own folder and not the folder to import it from.
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from fedrounds.diagnosis.text import experiment_rows, facts, verdict  # noqa: E402
from fedrounds.doctor import Doctor  # noqa: E402

FAILED_READINGS = (17, 404, 777)
EPOCHS = 3


def draw_readings(num: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Return readings [num, 12] of three kinds of machine, and which kind each is of."""
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.randint(3, (num,), generator=generator)
    centres = 2 * torch.eye(3).repeat(1, 4)
    return centres[kinds] + torch.randn(num, 12, generator=generator), kinds


def compute_loss(model: nn.Module, batch: object) -> tuple[Tensor, Tensor]:
    """Return the loss of a batch, and the outputs that it was computed from."""
    assert isinstance(batch, tuple)
    readings, kinds = batch
    outputs = model(readings)
    return functional.cross_entropy(outputs, kinds), outputs


def main() -> None:
    """Train, and print what happens."""
    torch.manual_seed(0)
    readings, kinds = draw_readings(1000, seed=1)
    readings[FAILED_READINGS, 5] = torch.nan
    numbered = TensorDataset(readings, kinds, torch.arange(1000))
    model = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)

    doctor = Doctor(model, optimizer, compute_loss, num_classes=3)
    for epoch in range(1, EPOCHS + 1):
        for batch_readings, batch_kinds, numbers in DataLoader(numbered, 50, shuffle=True):
            # In place of zero_grad, forward, backward and the optimizer's step.
            taken = doctor.step((batch_readings, batch_kinds), indices=numbers, epoch=epoch)
        print(f"epoch {epoch}: loss {taken.loss:.4f} after {taken.step} steps")
    doctor.finish()

    for diagnosis in doctor.diagnoses:
        print(f"\n{verdict(diagnosis)}")
        for name, fact in facts(diagnosis):
            print(f"  {name:12}  {fact}")
        for row in experiment_rows(diagnosis):
            print("  {:22} {:6} {:17} {}".format(*row).rstrip())
    with torch.no_grad():
        test_readings, test_kinds = draw_readings(500, seed=2)
        is_right = model(test_readings).argmax(dim=1) == test_kinds
    print(f"\nRight on {is_right.float().mean():.1%} of 500 new readings")


if __name__ == "__main__":
    main()
