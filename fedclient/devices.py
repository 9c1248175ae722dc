"""Where a client trains."""

import torch

from fedrounds.errors import InvalidInput


def find_device(name: str) -> torch.device:
    """Return the device of that name; `auto` is the first GPU, or without one the CPU.

    Raises:
        InvalidInput: it isn't there; the message lists those that are.
    """
    there = available_devices()
    if name == "auto":
        return torch.device(there[min(1, len(there) - 1)])
    wanted = "cuda:0" if name == "cuda" else name
    if wanted not in there:
        raise InvalidInput(
            f"--device {name} isn't there; there are: {', '.join(there)}. Give one of these, or "
            "auto for the first GPU and without one the CPU"
        )
    return torch.device(wanted)


def available_devices() -> list[str]:
    """Return the names of the devices of this machine, the CPU first."""
    there = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        there.append("mps")
    return there
