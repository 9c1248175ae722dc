"""Where a client trains: by name, and with the same outcome wherever that is."""

import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import TensorDataset

from fedclient import devices
from fedclient.devices import available_devices, find_device, may_have_gpu, refuse_absent_device
from fedrounds.data import make_loader
from fedrounds.doctor import TrainingHalted
from fedrounds.errors import InvalidInput
from fedrounds.tasks.models import SimpleCNN
from fedrounds.training.loop import incident_of, train_model

ACCELERATORS = available_devices()[1:]
needs_accelerator = pytest.mark.skipif(not ACCELERATORS, reason="there is no GPU here")


def _digits(num: int) -> TensorDataset:
    rng = torch.Generator().manual_seed(0)
    images = torch.randn(num, 1, 28, 28, generator=rng)
    return TensorDataset(images, torch.randint(10, (num,), generator=rng))


def _trained(device: torch.device) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    loader = make_loader(_digits(64), batch_size=16, seed=1)
    return train_model(SimpleCNN(), loader, epochs=1, device=device).state_dict


def test_a_device_is_found_by_name() -> None:
    assert find_device("cpu") == torch.device("cpu")
    assert find_device("auto") == torch.device(ACCELERATORS[0] if ACCELERATORS else "cpu")


@pytest.mark.parametrize("name", ["cuda:77", "gpu", "", "CPU"])
def test_a_device_that_isnt_there_lists_those_that_are(name: str) -> None:
    with pytest.raises(InvalidInput, match=f"--device {name} isn't there; there are: cpu"):
        find_device(name)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux is judged without torch")
def test_without_a_driver_a_gpu_is_refused_in_the_same_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The two drivers' names are replaced, first by those of no file, then by those of files."""
    monkeypatch.setattr(devices, "_AMD_DRIVER", tmp_path / "kfd")
    monkeypatch.setattr(devices, "_NVIDIA_DRIVER", str(tmp_path / "libcuda.so.1"))
    for name in ("cpu", "auto"):
        refuse_absent_device(name)
    for name in ("cuda", "cuda:1", "mps"):
        with pytest.raises(InvalidInput, match=f"--device {name} isn't there; there are: cpu. "):
            refuse_absent_device(name)
    (tmp_path / "kfd").touch()
    refuse_absent_device("cuda")
    (tmp_path / "kfd").unlink()
    monkeypatch.setattr(devices, "_NVIDIA_DRIVER", "libc.so.6")
    refuse_absent_device("cuda")


def test_a_gpu_that_torch_finds_has_a_driver() -> None:
    assert may_have_gpu() or not ACCELERATORS


@needs_accelerator
@pytest.mark.parametrize("name", ACCELERATORS)
def test_training_on_a_gpu_learns_what_the_cpu_learns(name: str) -> None:
    """Four steps of float32, summed in another order; the state_dict comes back on the CPU."""
    expected = _trained(torch.device("cpu"))
    for key, value in _trained(find_device(name)).items():
        assert value.device.type == "cpu"
        torch.testing.assert_close(value, expected[key], rtol=1e-3, atol=1e-4)


@needs_accelerator
@pytest.mark.parametrize("name", ACCELERATORS)
def test_a_gpu_names_the_step_that_stops_being_finite(name: str) -> None:
    """64 examples in batches of 16, not shuffled: number 40 is in the third."""
    examples = _digits(64)
    examples.tensors[0][40] = torch.nan
    loader = make_loader(examples, batch_size=16, shuffle=False)
    with pytest.raises(TrainingHalted) as stopped:
        train_model(SimpleCNN(), loader, epochs=1, device=find_device(name))
    assert incident_of(stopped.value.diagnosis).step == 3
