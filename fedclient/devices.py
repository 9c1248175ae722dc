"""The device that a client trains on."""

import torch

from fedrounds.errors import InvalidInput


def find_device(name: str) -> torch.device:
    """Return the device of that name; `auto` is the first GPU, or without one the CPU.

    Raises:
        InvalidInput: this machine doesn't have it; the message lists the devices there are.
    """
    available = available_devices()
    if name == "auto":
        return torch.device(available[min(1, len(available) - 1)])
    wanted = "cuda:0" if name == "cuda" else name
    if wanted not in available:
        raise InvalidInput(
            f"--device {name} isn't there; there are: {', '.join(available)}. Give one of "
            "these, or auto for the first GPU and without one the CPU"
        )
    return torch.device(wanted)


def available_devices() -> list[str]:
    """Return the names of the devices of this machine, the CPU first."""
    names = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        names.append("mps")
    return names
