"""Hundreds of updates at once: the same distances, and no more memory."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fedrounds.strategies.geometry import squared_distances
from tests.factories import write_state
from tests.processes import ROOT
from tests.vectors import aggregate, cohort_of

MIB = 1 << 20
NUM_UPDATES = 600
MOST_BYTES = 120 * MIB

# Prints by how many bytes the resident peak of a process grows that does nothing else. The kernel's
# count and not getrusage's, which begins at the peak of the process that started it.
AGGREGATING = """
import re, sys
from pathlib import Path
from fedrounds.strategies.registry import find_strategy
from fedrounds.strategies import blocks
from fedrounds.strategies.blocks import Cohort, StateFile
from fedrounds.strategies.server_step import next_blocks
from fedrounds.tensors.codec import read_layout
from fedrounds.memory import keep_one_heap
from fedrounds.types import EntryKind

keep_one_heap()
blocks._NUM_THREADS = 2
name, folder = sys.argv[1], Path(sys.argv[2])
files = [
    StateFile(path=path, layout=read_layout(path), num_examples=3)
    for path in sorted(folder.iterdir())
]


def peak_bytes():
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1])


updates = [files[number % len(files)] for number in range(int(sys.argv[3]))]
cohort = Cohort(base=files[0], updates=updates, kinds={"w": EntryKind.PARAMETER})
before = peak_bytes()
for _ in next_blocks(find_strategy(name), cohort):
    pass
print(peak_bytes() - before)
"""


def test_distances_of_hundreds_are_those_of_the_oracle(tmp_path: Path) -> None:
    """Of updates that differ much, hardly and not at all, wherever in the cohort the two are."""
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(1500, generator=generator)
    updates = [base + 0.01 * torch.randn(len(base), generator=generator) for _ in range(280)]
    updates[130], updates[260], updates[279] = updates[1] * (1 + 1e-6), updates[2], updates[278]
    updates[140] = base + 1e3
    distances = squared_distances(
        cohort_of(tmp_path, {"w": base}, [{"w": update} for update in updates])
    )
    points = np.stack([vector.double().numpy() for vector in (base, *updates)]).astype(
        np.longdouble
    )
    for row, point in enumerate(points):
        expected = ((points - point) ** 2).sum(axis=1)
        assert (np.abs(distances[row] - expected) <= 2e-9 * expected).all(), row
    assert distances[3, 261] == distances[280, 279] == 0
    assert np.array_equal(distances, distances.T)


@pytest.mark.parametrize("strategy", ["median", "krum", "nnm+median"])
def test_hundreds_of_updates_take_no_more_memory_than_their_blocks(
    tmp_path: Path, strategy: str
) -> None:
    """Two threads, each with a block of every update: 8 MiB, and of 1024 columns 10 in float64.

    To that come some matrices of all pairs, of 3 MiB, and what the libraries take at their first
    use. With a dozen such matrices in each thread it was 160 MiB.
    """
    generator = torch.Generator().manual_seed(4)
    for _ in range(50):
        write_state(tmp_path, {"w": torch.randn(30_000, generator=generator)})
    done = subprocess.run(
        [sys.executable, "-c", AGGREGATING, strategy, str(tmp_path), str(NUM_UPDATES)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    grown_bytes = int(done.stdout)
    assert grown_bytes <= MOST_BYTES, f"{grown_bytes / MIB:.0f} MiB"


def test_a_trimmed_mean_cuts_the_share_that_is_meant(tmp_path: Path) -> None:
    """0.29 times 100 is 28.999... in float64: 29 are cut at either end all the same."""
    updates = np.random.default_rng(4).permutation(np.arange(100.0) ** 2)[:, None]
    mean = aggregate(tmp_path, "trimmed-mean", updates, {"trim": 0.29})
    assert mean == pytest.approx(np.mean(np.arange(29, 71) ** 2))
