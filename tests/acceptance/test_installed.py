"""The project as it is installed: from its wheel, and in a clone where nothing is."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from tests.processes import GENEROUS_S, ROOT

PACKAGES = ("fedclient", "fedrounds", "fedserver")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the wheel that pip makes of this tree, without reaching an index."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("fedserver", "fedclient", "shared"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, tree / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    made = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"),
            *("--no-build-isolation", "--disable-pip-version-check"),
            *("--wheel-dir", made, tree),
        ],
        check=True,
        timeout=GENEROUS_S,
    )
    [path] = made.iterdir()
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a fresh environment with the wheel in it; the packages it needs are those of ours."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    scheme = sysconfig.get_preferred_scheme("prefix")
    base = {"base": str(folder), "platbase": str(folder)}
    site = Path(sysconfig.get_path("purelib", scheme, base))
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "--python", folder / "bin" / "python"),
            *(
                "install",
                "--quiet",
                "--no-deps",
                "--no-index",
                "--disable-pip-version-check",
                wheel,
            ),
        ],
        check=True,
        timeout=GENEROUS_S,
    )
    # The folder alone: an editable install of ours beside it isn't taken into account.
    (site / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    return folder


def run_there(environment: Path, folder: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    """Run a command of the environment in a folder."""
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTHON", "FED", "VIRTUAL_ENV"))
    }
    return subprocess.run(
        [environment / "bin" / argv[0], *argv[1:]],
        cwd=folder,
        env=clean,
        capture_output=True,
        text=True,
        timeout=GENEROUS_S,
        check=False,
    )


def test_the_wheel_holds_the_three_packages_and_their_types(wheel: Path) -> None:
    """Nothing of tests, scripts or benchmarks is installed on anybody's path."""
    names = zipfile.ZipFile(wheel).namelist()
    folders = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert folders == set(PACKAGES)
    assert {f"{package}/py.typed" for package in PACKAGES} <= set(names)
    assert "fedrounds/data/mnist_sample.npz" in names
    modules = {
        str(path.relative_to(root))
        for root in (ROOT, ROOT / "shared")
        for package in PACKAGES
        for path in (root / package).rglob("*.py")
    }
    assert modules <= set(names)


def test_installed_it_works_beside_folders_of_the_same_names(
    installed: Path, tmp_path: Path
) -> None:
    """Somebody's own shared/, tests/ and scripts/ are theirs; the commands and modules are ours."""
    for name in ("shared", "tests", "scripts"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('not yours')\n")
    version = importlib.metadata.version("fedrounds")
    for command in ("fedserver", "fedclient"):
        asked = run_there(installed, tmp_path, command, "--version")
        assert (asked.returncode, asked.stdout) == (0, f"fedrounds {version}\n"), asked.stderr
    code = "import fedrounds; print(fedrounds.__file__); print(len(fedrounds.load_data()[0]))"
    asked = run_there(installed, tmp_path, "python", "-c", code)
    where, num_clients = asked.stdout.splitlines()
    assert where.startswith(str(installed)), asked.stdout + asked.stderr
    assert num_clients == "10"


@pytest.mark.parametrize("side", ["fedserver", "fedclient"])
def test_a_clone_that_is_not_installed_says_how_to_install_it(side: str) -> None:
    """Python without its site-packages stands for one where nothing is installed."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    asked = subprocess.run(
        [sys.executable, "-S", "-m", side],
        cwd=ROOT,
        env=clean,
        capture_output=True,
        text=True,
        timeout=GENEROUS_S,
        check=False,
    )
    assert asked.returncode == 1
    assert asked.stderr == (
        f"{side}: fedrounds isn't installed; run scripts/setup in the clone, then "
        f".venv/bin/python -m {side}; or install the project with pip\n"
    )
