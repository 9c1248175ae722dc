"""The device that a client trains on."""

import ctypes
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fedrounds.errors import InvalidInput

if TYPE_CHECKING:
    import torch

_AMD_DRIVER = Path("/dev/kfd")
_NVIDIA_DRIVER = "libcuda.so.1"
"""CUDA's runtime loads it by this name."""


def refuse_absent_device(name: str) -> None:
    """Refuse a GPU on a machine without a GPU driver, before torch is imported.

    torch takes seconds to import. Whatever needs torch to decide is left to `find_device`.

    Raises:
        InvalidInput: this machine doesn't have the device.
    """
    if name not in ("cpu", "auto") and not may_have_gpu():
        raise _absent(name, ["cpu"])


def may_have_gpu() -> bool:
    """Whether torch could find a GPU here; False only on Linux without any GPU driver."""
    if sys.platform != "linux" or _AMD_DRIVER.exists():
        return True
    try:
        ctypes.CDLL(_NVIDIA_DRIVER)
    except OSError:
        return False
    return True


def find_device(name: str) -> "torch.device":
    """Return the device of that name; `auto` is the first GPU, or without a GPU the CPU.

    Raises:
        InvalidInput: this machine doesn't have the device; the message lists its devices.
    """
    import torch  # noqa: PLC0415

    available = available_devices()
    if name == "auto":
        return torch.device(available[min(1, len(available) - 1)])
    wanted = "cuda:0" if name == "cuda" else name
    if wanted not in available:
        raise _absent(name, available)
    return torch.device(wanted)


def available_devices() -> list[str]:
    """Return the names of the devices of this machine, the CPU first."""
    import torch  # noqa: PLC0415

    names = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        names.append("mps")
    return names


def _absent(name: str, available: list[str]) -> InvalidInput:
    return InvalidInput(
        f"--device {name} isn't there; there are: {', '.join(available)}. Give one of "
        "these, or auto for the first GPU and without one the CPU"
    )
