"""The house: who may import whom, what must not be there, and that maps and copies are current."""

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedserver.store import Store
from tests.factories import begin_round, store_updates

ROOT = Path(__file__).parents[2]
GENERATED = "shared/fedrounds/wire/pb/"
MAX_LINES = 600


def project_files() -> list[str]:
    """Return the files that are in the repository or would be added to it, from its root."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\n")
    return sorted(name for name in set(listed) if name and (ROOT / name).is_file())


FILES = project_files()
MODULES = [name for name in FILES if name.endswith(".py") and not name.startswith(GENERATED)]
PRODUCT = [
    name for name in MODULES if name.startswith(("shared/fedrounds/", "fedserver/", "fedclient/"))
]


def parse(name: str) -> ast.Module:
    """Return a file's syntax tree."""
    return ast.parse((ROOT / name).read_text(), filename=name)


def imports_of(name: str) -> Iterator[str]:
    """Yield what a file imports, at its top or deep inside: modules, and names from them."""
    for node in ast.walk(parse(name)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively; say the whole name"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_within(imported: str, package: str) -> bool:
    """Whether `imported` is the package, or something in it."""
    return imported == package or imported.startswith(package + ".")


def breaches(files: list[str], *forbidden: str, but: tuple[str, ...] = ()) -> list[str]:
    """Return "file imports name" for whatever these files import of what is forbidden."""
    return [
        f"{name} imports {imported}"
        for name in files
        for imported in imports_of(name)
        if any(is_within(imported, package) for package in forbidden)
        and not any(is_within(imported, package) for package in but)
    ]


def under(*folders: str) -> list[str]:
    """Return the product's modules in these folders, or these files."""
    return [name for name in PRODUCT if name.startswith(folders)]


def outside(*folders: str) -> list[str]:
    """Return the product's modules that are in none of these folders."""
    return [name for name in PRODUCT if not name.startswith(folders)]


OURS = ("fedrounds", "fedserver", "fedclient")


def test_the_two_sides_never_import_each_other_nor_fedrounds_them() -> None:
    """Fedserver -> fedrounds <- fedclient: either side can be installed, read and changed alone."""
    assert breaches(under("fedserver/"), "fedclient") == []
    assert breaches(under("fedclient/"), "fedserver") == []
    assert breaches(under("shared/fedrounds/"), "fedserver", "fedclient") == []
    assert breaches(PRODUCT, "tests", "benchmarks", "scripts") == []


def test_only_the_two_ends_of_the_wire_know_grpc_and_protobuf() -> None:
    """Everything else speaks the values of fedrounds.types.

    The messages are translated in fedrounds.wire, once for both ends; it knows no gRPC.
    """
    rest = outside("fedserver/api/service.py", "fedclient/connection.py")
    assert breaches(rest, "grpc", "grpc_health", "grpc_reflection") == []
    rest = [name for name in rest if not name.startswith("shared/fedrounds/wire/")]
    assert breaches(rest, "google.protobuf", "fedrounds.wire.pb") == []


def test_only_the_store_knows_sql() -> None:
    """Tables and queries are in one folder, and only its front door is used from outside."""
    rest = outside("fedserver/store/")
    assert breaches(rest, "sqlalchemy", "sqlite3") == []
    inner = [
        f"fedserver.store.{path.stem}"
        for path in (ROOT / "fedserver/store").glob("*.py")
        if path.stem != "__init__"
    ]
    allowed = (
        "fedserver.store.Store",
        "fedserver.store.read_history",
        "fedserver.store.read_rounds",
    )
    assert breaches(rest, *inner, but=allowed) == []


def test_fedrounds_has_no_sockets() -> None:
    """What both sides share runs anywhere; only public data sets are fetched, in one file."""
    rest = [
        name for name in under("shared/fedrounds/") if name != "shared/fedrounds/data/datasets.py"
    ]
    assert breaches(rest, "socket", "asyncio", "http", "urllib", "ssl", "grpc") == []


def test_strategies_and_phases_depend_on_next_to_nothing() -> None:
    """An algorithm can be read with fedrounds beside it, and the phases with the errors alone."""
    strategies = under("shared/fedrounds/strategies/")
    assert breaches(strategies, *OURS, but=("fedrounds", "fedrounds.strategies")) == []
    assert breaches(["fedserver/phases.py"], *OURS, but=("fedrounds.errors",)) == []


WORKING = (
    "fedserver/api/",
    "fedserver/clients/",
    "fedserver/housekeeping/",
    "fedserver/models/",
    "fedserver/phases.py",
    "fedserver/rounds/",
    "fedserver/store/",
    "shared/fedrounds/strategies/",
    "fedserver/updates/",
)


def test_who_works_knows_nobody_who_watches() -> None:
    """Take the live view or the reports away, and nothing else changes."""
    watching = ("fedserver.monitoring", "fedserver.reporting", "fedserver.commands")
    roots = ("fedserver.server", "fedserver.composition")
    assert breaches(under(*WORKING), *watching, *roots, "rich", "matplotlib") == []
    rest = outside("fedserver/server.py", "fedserver/monitoring/")
    assert breaches(rest, "fedserver.monitoring") == []


def test_only_the_composition_root_knows_the_api_and_the_round_loop() -> None:
    """The two meet in the store and the open orders, never in each other."""
    roots = ("fedserver/server.py", "fedserver/composition.py")
    rest = outside(*roots, "fedserver/api/", "fedserver/rounds/")
    assert breaches(rest, "fedserver.api.service", "fedserver.rounds.coordinator") == []
    assert breaches(under("fedserver/api/"), "fedserver.rounds.coordinator") == []
    assert breaches(under("fedserver/api/"), "fedserver.rounds") == []
    assert breaches(under("fedserver/rounds/"), "fedserver.api") == []


LAYERS = (
    ("store", "updates"),
    ("models",),
    ("clients",),
    ("housekeeping",),
    ("rounds", "api"),
    ("reporting", "verification"),
    ("commands", "monitoring"),
)
"""The server's packages, the lowest layer first."""

ROOTS = tuple(f"fedserver/{name}.py" for name in ("__main__", "server", "composition", "prepared"))


def test_the_servers_packages_are_layers() -> None:
    """A package imports only packages of lower layers; the modules beside them import none.

    The exceptions are the command, and the modules that examine and build everything.
    """
    packages = {name for layer in LAYERS for name in layer}
    assert packages == {path.parent.name for path in (ROOT / "fedserver").glob("*/__init__.py")}
    lower: set[str] = set()
    modules = [name for name in under("fedserver/") if name.count("/") == 1]
    allowed = {name: lower for name in modules if name not in ROOTS}
    for layer in LAYERS:
        for package in layer:
            allowed |= {name: lower | {package} for name in under(f"fedserver/{package}/")}
        lower = lower | set(layer)
    assert [
        breach
        for name, known in allowed.items()
        for breach in breaches([name], *(f"fedserver.{package}" for package in packages - known))
    ] == []


def test_the_lines_above_are_drawn_where_something_is() -> None:
    """The files and packages that the rules name exist and do what they alone may do."""
    assert breaches(["fedserver/api/service.py"], "grpc")
    assert breaches(["fedclient/connection.py"], "grpc")
    assert breaches(under("fedserver/store/"), "sqlalchemy")
    assert breaches(["fedserver/server.py"], "fedserver.monitoring")
    assert len(under("shared/fedrounds/strategies/")) >= 3
    assert len(PRODUCT) > 40


def test_no_file_is_too_long_to_read() -> None:
    """At most 600 lines; generated code aside. A file is as long as its one subject needs."""
    lengths = {name: len((ROOT / name).read_text().splitlines()) for name in MODULES}
    assert {name: count for name, count in lengths.items() if count > MAX_LINES} == {}


def unsafe_calls(tree: ast.Module) -> Iterator[str]:
    """Yield what would unpickle, or run text as code."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if re.fullmatch(r"(torch|joblib|marshal|shelve)\.(load|save|open)|eval|exec", called):
            yield called
        for keyword in node.keywords:
            if keyword.arg == "allow_pickle" and ast.unparse(keyword.value) != "False":
                yield f"{called}(allow_pickle=...)"


def test_nothing_is_ever_unpickled() -> None:
    """Bytes from elsewhere can't run code: no pickle, no torch.load, no NumPy objects."""
    unsafe = [f"{name}: {call}" for name in MODULES for call in unsafe_calls(parse(name))]
    assert unsafe == []
    picklers = ("pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "torch.load")
    assert breaches(MODULES, *picklers) == []
    traps = "torch.load(f)\nnp.load(f, allow_pickle=True)\neval(s)"
    assert len(list(unsafe_calls(ast.parse(traps)))) == 3


WITHOUT_TORCH = """
import sys
from fedserver.__main__ import main
code = main(sys.argv[1:])
heavy = sorted({"torch", "numpy", "grpc", "alembic"} & sys.modules.keys())
print(f"exit code {code}, imported {heavy}", file=sys.stderr)
"""


COMMANDS = [["history"], ["history", "--json"], ["show"], ["show", "--json"]]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_looking_at_a_run_does_not_wait_for_torch(tmp_path: Path, command: list[str]) -> None:
    """These commands answer without importing torch, NumPy, gRPC or alembic."""
    store = Store(tmp_path / "federation.sqlite")
    run, opened = begin_round(store)
    store_updates(store, run, opened)
    store.close()
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *command, "--state-dir", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr.splitlines()[-1] == "exit code 0, imported []"
    assert "collecting" in done.stdout.lower()


def mapped_paths() -> list[str]:
    """Return the paths of README's map: the first words of its lines, under `## Map`."""
    _, _, behind = (ROOT / "README.md").read_text().partition("\n## Map\n")
    block = behind.split("```")[1].partition("\n")[2]
    paths = [line.split()[0] for line in block.splitlines() if line.strip()]
    assert paths, "README.md has no fenced block under the heading '## Map'"
    return paths


def test_the_readmes_map_is_the_tree() -> None:
    """Every module and script is in the map, or in a folder that is; and nothing else is."""
    paths = mapped_paths()
    assert sorted(set(paths)) == sorted(paths), "a path is listed twice"
    assert [path for path in paths if not (ROOT / path).exists()] == []
    folders = tuple(path for path in paths if path.endswith("/"))
    sources = [
        name
        for name in FILES
        if name.startswith(("shared/fedrounds/", "fedserver/", "fedclient/", "scripts/"))
        and (name.endswith(".py") or name.startswith("scripts/"))
        # A package's own file is listed only where it holds more than a sentence.
        and not name.endswith("/__init__.py")
    ]
    missing = [name for name in sources if name not in paths and not name.startswith(folders)]
    assert missing == []


def tool(name: str) -> str:
    """Return the path of a development tool, installed beside this Python or on the PATH."""
    path = shutil.which(name, path=f"{Path(sys.executable).parent}") or shutil.which(name)
    assert path is not None, f"{name} is not installed; install the extra [dev]"
    return path


def test_the_generated_code_is_that_of_the_protocol(tmp_path: Path) -> None:
    """scripts/gen_protos, run anew, makes the committed bytes."""
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    subprocess.run(
        [ROOT / "scripts/gen_protos", tmp_path], env={"PATH": path}, check=True, timeout=60
    )
    made = {
        file.name: file.read_bytes()
        for file in (tmp_path / GENERATED.removeprefix("shared/")).iterdir()
    }
    committed = {
        name.removeprefix(GENERATED): (ROOT / name).read_bytes()
        for name in FILES
        if name.startswith(GENERATED) and "federation_pb2" in name
    }
    assert made.keys() == committed.keys()
    assert [name for name, content in made.items() if content != committed[name]] == []


def test_the_protocol_passes_its_linter() -> None:
    """Buf lint, STANDARD, finds nothing."""
    done = subprocess.run(
        [tool("buf"), "lint"], cwd=ROOT / "protos", capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize(
    "kept", sorted((ROOT / "protos/released").glob("*.binpb")), ids=lambda path: path.stem
)
def test_the_protocol_breaks_nothing_that_was_released(kept: Path) -> None:
    """Buf breaking, PACKAGE, finds nothing against the descriptor that was kept."""
    done = subprocess.run(
        [tool("buf"), "breaking", "--against", kept],
        cwd=ROOT / "protos",
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "")
