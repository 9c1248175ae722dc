"""Small whole runs whose models must stay the same, bit for bit, when the code is restructured.

    python -m benchmarks.golden_runs --check [--busy] [--without-avx] [--only NAME,...]
    python -m benchmarks.golden_runs --write [--only NAME,...]

Each run has a fixed seed and is made by the public commands alone: a server process, a client
process, `history --json` and `verify`. `--write` records the runs in benchmarks/golden_runs.json,
with the date and what of the machine decides about the bits. `--check` makes the runs again and
names each value that differs; the exit code is 1 if one does. `--busy` keeps all cores busy
meanwhile, so that the runs are slow and their processes take turns in another way.

Two runs go on at the same time. Nothing of the product is imported here, so that modules can be
renamed and moved; benchmarks.golden_task imports the Task plug-in.
"""

import argparse
import json
import os
import platform
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3

ROOT = Path(__file__).resolve().parent.parent
GOLDEN_FILE = ROOT / "benchmarks" / "golden_runs.json"

LONGEST_RUN_S = 600.0
POLL_S = 0.05
NUM_AT_A_TIME = 2

_SERVER = """
    --task benchmarks.golden_task:blobs --batch-size 8 --epochs 2 --rounds 3 --seed 7 --threads 1
    --stall-after 3600 --lease 3600 --first-step 3600 --farewell 300 --keep-updates all
"""
"""Nothing in a run ends by time, however slow the machine is. Flags given later win."""

_OLD_CPU = {
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
}
"""Lets torch and its libraries compute as on a CPU without AVX."""

_DEPENDS_ON_MACHINE = (
    "Digests, evaluations and metrics of every run may differ; so may what rests on such numbers:"
    " the cohorts of qfedavg-power-of-choice, the verdicts of excluded-by-norm, the phases of"
    " model-taken-back. Rounds, counted updates, num_examples and staleness of the other runs may"
    " not."
)

_SETTLED_PHASES = ("DONE", "ROLLED_BACK")
"""The phases of an attempt that made a model. Time decides how far any other attempt comes."""

Record = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One run: flags of the server, and its clients, which are all in one process."""

    name: str
    server_flags: str = ""
    num_clients: int = 3
    client_flags: str = ""
    is_asynchronous: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables of the client process (benchmarks.golden_task lists them)."""
    killed_twin: str | None = None
    """Name of the same run without a kill, for a run in which both sides are killed by kill -9
    and started again."""

    @property
    def client_ids(self) -> str:
        """The clients' numbers, as `--ids` takes them."""
        return f"0-{self.num_clients - 1}" if self.num_clients > 1 else "0"


_SCAFFOLD = "--strategy scaffold --momentum 0"
_KILL_STEP = 45
"""In the second round, while the second of three clients trains; a round has 30 steps."""

RUNS: Sequence[Run] = (
    Run("fedavg"),
    Run(
        "fedprox",
        "--strategy fedprox --strategy-parameters mu=0.1 --optimizer adamw --lr 0.01"
        " --clip-norm 0.5 --weight-decay 0.01 --schedule step --decay-epochs 2 --warmup-epochs 1",
    ),
    Run(
        "clip-uniform-fedadam",
        "--strategy clip+uniform+fedadam --strategy-parameters server_lr=0.05",
    ),
    Run(
        "bucketing-median-fedyogi",
        "--strategy bucketing+median+fedyogi --strategy-parameters server_lr=0.05,size=2",
        num_clients=6,
    ),
    Run(
        "trimmed-mean-fedavgm-float16",
        "--strategy trimmed-mean+fedavgm --compression float16"
        " --strategy-parameters trim=0.2,server_momentum=0.5,nesterov=1",
        num_clients=5,
    ),
    Run(
        "nnm-krum-bfloat16",
        "--strategy nnm+krum --strategy-parameters f=1 --compression bfloat16",
        num_clients=5,
    ),
    Run("bulyan", "--strategy bulyan --strategy-parameters f=1", num_clients=7),
    Run("geometric-median-fedadagrad", "--strategy geometric-median+fedadagrad", num_clients=4),
    Run("fednova", "--strategy fednova --stragglers 0.5 --epochs 3 --rounds 4"),
    Run(
        "qfedavg-power-of-choice",
        "--strategy qfedavg --strategy-parameters q=2 --evaluate-on-clients"
        " --cohort power-of-choice --clients-per-round 2 --cohort-candidates 4 --rounds 4",
        num_clients=6,
    ),
    Run("scaffold", _SCAFFOLD),
    Run("scaffold-killed", _SCAFFOLD, killed_twin="scaffold"),
    Run("feddyn", "--strategy feddyn --strategy-parameters alpha=0.1"),
    Run("fedbn", "--strategy fedbn --holdout 0.25 --evaluate-on-clients"),
    Run("ditto-top-k", "--strategy ditto --compression top-k --compression-fraction 0.2"),
    Run(
        "int8-local-entries",
        "--task benchmarks.golden_task:with_local_head --compression int8 --compression-block 64",
    ),
    Run(
        "fedbuff",
        "--strategy fedbuff --strategy-parameters buffer_size=2 --rounds 4",
        num_clients=1,
        is_asynchronous=True,
    ),
    Run("doctor-cures-nan", environment={"GOLDEN_BAD_CLIENT": "1"}),
    Run("excluded-by-norm", "--norm-band 0.5 --min-updates 3", num_clients=6),
    Run(
        "model-taken-back",
        "--rounds 7 --max-rollbacks 1",
        client_flags="--doctor off",
        environment={"GOLDEN_WORSEN_AFTER": "95"},
    ),
    Run(
        "digits",
        "--task mnist-sample --partition dirichlet --alpha 0.5 --num-partitions 60"
        " --batch-size 32 --augment shift --schedule cosine --init kaiming_normal --rounds 2",
    ),
)


def make_run(run: Run, environment: Mapping[str, str]) -> Record:
    """Return the record of one run, made in a folder that is deleted afterwards.

    Raises:
        RuntimeError: a process failed or took too long; the message holds the end of its log.
    """
    with tempfile.TemporaryDirectory(prefix="golden-") as name:
        folder = Path(name)
        final_model = folder / "final.safetensors"
        state_dir = ["--state-dir", str(folder / "server")]
        port = _free_port()
        waits_for_all = "" if run.is_asynchronous else "--require-all"
        server_command = [
            *shlex.split(f"{_SERVER} {waits_for_all} {run.server_flags}"),
            *("--port", str(port), "--export", str(final_model), *state_dir),
            *("--min-clients", str(run.num_clients)),
        ]
        if "--num-partitions" not in run.server_flags:
            server_command += ["--num-partitions", str(run.num_clients)]
        task = "mnist-sample" if "mnist-sample" in run.server_flags else _task_of(run)
        client_command = [
            *("--ids", run.client_ids, "--server", f"127.0.0.1:{port}", "--threads", "1"),
            *("--state-dir", str(folder / "clients"), "--task", task),
            *shlex.split(run.client_flags),
        ]
        if run.killed_twin is not None:
            reached = folder / "reached"
            halting = {"GOLDEN_HALT": f"{_KILL_STEP}:{reached}"}
            with _started(
                folder, server_command, client_command, environment, {**run.environment, **halting}
            ) as processes:
                _wait_for_file(reached, processes)
            # The processes have been killed by SIGKILL, since they hadn't ended.
            if final_model.exists():
                raise RuntimeError(f"{run.name}: the run was over before the kill")
        with _started(
            folder, server_command, client_command, environment, run.environment
        ) as processes:
            _wait_for_ends(processes)
        attempts = json.loads(_output_of(["history", "--json", *state_dir]))
        if run.killed_twin is not None or run.is_asynchronous:
            _output_of(["verify", *state_dir])
        digest = blake3(final_model.read_bytes()).hexdigest()
    return {"final_model": digest, "rounds": [_record_attempt(attempt) for attempt in attempts]}


def _task_of(run: Run) -> str:
    words = shlex.split(f"{_SERVER} {run.server_flags}")
    return words[len(words) - words[::-1].index("--task")]


def _record_attempt(attempt: Record) -> Record:
    """Return an attempt's values in `history --json` that repeat exactly: no time, no random id."""
    record = {name: attempt[name] for name in ("round", "attempt", "phase", "base_digest")}
    if attempt["phase"] not in _SETTLED_PHASES:
        return record
    counted = [update for update in attempt["updates"] if update["verdict"] == "COUNTED"]
    return {
        **record,
        "model_digest": attempt["model_digest"],
        "num_counted": len(counted),
        "cohort": attempt["cohort"],
        "adjustments": attempt["adjustments"],
        "evaluation": _numbers(attempt["evaluation"]),
        "client_evaluation": _numbers(attempt["client_evaluation"]),
        "updates": [_record_update(update) for update in attempt["updates"]],
        "incidents": [_record_incident(incident) for incident in attempt["incidents"]],
    }


def _record_update(update: Record) -> Record:
    names = ("client", "verdict", "staleness", "num_examples", "encoding", "digest")
    return {name: update[name] for name in names} | {"metrics": _numbers(update["metrics"])}


def _numbers(metrics: Record | None) -> Record:
    """Return the metrics that are one number each and no time."""
    return {
        name: value
        for name, value in (metrics or {}).items()
        if isinstance(value, int | float) and not name.endswith("_s")
    }


def _record_incident(incident: Record) -> Record:
    diagnosis = incident.get("diagnosis", {})
    facts = {name: incident[name] for name in ("kind", "client", "step") if name in incident}
    return facts | {name: diagnosis[name] for name in ("symptom", "cause") if name in diagnosis}


@dataclass(frozen=True)
class _Process:
    popen: subprocess.Popen[bytes]
    log: Path

    def failure(self, what: str) -> RuntimeError:
        command = shlex.join(str(word) for word in self.popen.args)  # type: ignore[union-attr]
        return RuntimeError(f"{command}\n{what}\n{self.log.read_text()[-3000:]}")


@contextmanager
def _started(
    folder: Path,
    server_command: list[str],
    client_command: list[str],
    environment: Mapping[str, str],
    client_environment: Mapping[str, str],
) -> Iterator[list[_Process]]:
    """Start server and clients; whatever still runs at the end is killed by SIGKILL."""
    with ExitStack() as stack:
        server = _start("fedserver", server_command, folder / "server.log", environment)
        stack.callback(_kill, server)
        _wait_for_port(int(server_command[server_command.index("--port") + 1]), server)
        client = _start(
            "fedclient",
            client_command,
            folder / "client.log",
            {**environment, **client_environment},
        )
        stack.callback(_kill, client)
        yield [server, client]


def _start(module: str, flags: list[str], log: Path, environment: Mapping[str, str]) -> _Process:
    with log.open("w") as file:
        popen = subprocess.Popen(
            [sys.executable, "-m", module, *flags],
            cwd=ROOT,
            env=_environment(environment),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
        )
    return _Process(popen, log)


def _environment(more: Mapping[str, str]) -> dict[str, str]:
    own_prefixes = ("FEDSERVER_", "FEDCLIENT_", "FED_", "GOLDEN_", *_OLD_CPU)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(own_prefixes)}
    return {**kept, **more}


def _kill(process: _Process) -> None:
    process.popen.kill()
    process.popen.wait()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


def _wait_for_port(port: int, server: _Process) -> None:
    for _ in _until_too_long([server]):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return


def _wait_for_file(path: Path, processes: list[_Process]) -> None:
    for _ in _until_too_long(processes):
        if path.exists():
            return


def _wait_for_ends(processes: list[_Process]) -> None:
    for _ in _until_too_long(processes, may_end=True):
        if all(process.popen.poll() == 0 for process in processes):
            return


def _until_too_long(processes: list[_Process], *, may_end: bool = False) -> Iterator[None]:
    """Yield again and again while these processes run, or have ended well where they may end."""
    deadline = time.monotonic() + LONGEST_RUN_S
    while time.monotonic() < deadline:
        yield
        time.sleep(POLL_S)
        for process in processes:
            code = process.popen.poll()
            if code is not None and (code != 0 or not may_end):
                raise process.failure(f"ended with exit code {code}")
    raise processes[0].failure(f"took more than {LONGEST_RUN_S:.0f} s")


def _output_of(arguments: list[str]) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "fedserver", *arguments],
        cwd=ROOT,
        env=_environment({}),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{arguments[0]} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def make_runs(runs: Sequence[Run], environment: Mapping[str, str]) -> dict[str, Record]:
    """Return the record of each run by name; a line on standard error says that it is done.

    Raises:
        RuntimeError: a run failed, or one with a kill isn't the same as its twin.
    """

    def make(run: Run) -> Record:
        start = time.monotonic()
        record = make_run(run, environment)
        print(f"{run.name}: {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)
        return record

    with ThreadPoolExecutor(NUM_AT_A_TIME) as threads:
        records = dict(zip([run.name for run in runs], threads.map(make, runs), strict=True))
    for run in runs:
        if run.killed_twin in records:
            twin, killed = (_models(records[name]) for name in (run.killed_twin, run.name))
            if differences := find_differences(twin, killed, run.name):
                lines = "\n".join(differences)
                raise RuntimeError(f"{run.name} isn't what it is without the kill:\n{lines}")
    return records


def _models(record: Record) -> list[tuple[object, ...]]:
    rounds = [(made["round"], made["phase"], made.get("model_digest")) for made in record["rounds"]]
    return [(record["final_model"],), *rounds]


def find_differences(golden: object, made: object, path: str) -> list[str]:
    """Return a line for each value that differs, which begins with `path` and the place in it."""
    pairs: list[tuple[str, object, object]]
    if isinstance(golden, dict) and isinstance(made, dict):
        names = [*golden, *(name for name in made if name not in golden)]
        pairs = [(f"{path}.{name}", golden.get(name), made.get(name)) for name in names]
    elif isinstance(golden, list) and isinstance(made, list) and len(golden) == len(made):
        pairs = [
            (f"{path}[{index}]", *pair) for index, pair in enumerate(zip(golden, made, strict=True))
        ]
    else:
        return [] if golden == made else [f"{path}: {golden!r}, now {made!r}"]
    return [
        line
        for inner_path, *both in pairs
        for line in find_differences(both[0], both[1], inner_path)
    ]


def describe_machine() -> dict[str, str]:
    """Return the facts that the bits depend on: CPU, how torch uses it, versions."""
    cpu = platform.processor() or platform.machine()
    path = Path("/proc/cpuinfo")
    if path.exists():
        names = [line for line in path.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].partition(":")[2].strip() if names else cpu
    return {
        "cpu": cpu,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch": version("torch"),
        "numpy": version("numpy"),
        "python": platform.python_version(),
        "system": platform.system(),
    }


@contextmanager
def _all_cores_busy() -> Iterator[None]:
    busy = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"])
        for _ in range(os.cpu_count() or 1)
    ]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def write(runs: Sequence[Run]) -> None:
    """Make these runs and write them into the golden file, one line a round.

    Raises:
        RuntimeError: a run failed, or the file's other runs were made on another machine.
    """
    machine = describe_machine()
    golden = json.loads(GOLDEN_FILE.read_text()) if GOLDEN_FILE.exists() else {}
    if len(runs) < len(RUNS) and golden.get("machine", machine) != machine:
        raise RuntimeError("the golden file is of another machine: write all runs, without --only")
    records = golden.get("runs", {}) | make_runs(runs, {})
    head = {
        "written": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "command": "python -m benchmarks.golden_runs --write",
        "machine": machine,
        "differs_on_another_machine": _DEPENDS_ON_MACHINE,
    }
    run_texts = [
        f'  "{run.name}": {{\n   "final_model": "{records[run.name]["final_model"]}",\n'
        '   "rounds": [\n'
        + ",\n".join(f"    {json.dumps(made)}" for made in records[run.name]["rounds"])
        + "\n   ]\n  }"
        for run in RUNS
        if run.name in records
    ]
    head_text = json.dumps(head, indent=1).removesuffix("\n}")
    GOLDEN_FILE.write_text(head_text + ',\n "runs": {\n' + ",\n".join(run_texts) + "\n }\n}\n")


def check(runs: Sequence[Run], environment: Mapping[str, str]) -> bool:
    """Make the runs and print what differs from the golden file; returns whether nothing does."""
    golden = json.loads(GOLDEN_FILE.read_text())
    for line in find_differences(golden["machine"], describe_machine(), "machine"):
        print(f"another machine than that of the golden file, digests may differ: {line}")
    records = make_runs(runs, environment)
    lines = [
        line
        for name, record in records.items()
        for line in find_differences(golden["runs"].get(name), record, name)
    ]
    print("\n".join(lines), end="\n" if lines else "")
    differing = {line.partition(".")[0].partition(":")[0] for line in lines}
    print(f"{len(records) - len(differing)} of {len(records)} runs are the same")
    return not lines


def main() -> int:
    """Return the exit code of the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--write", action="store_true", help="record the runs")
    action.add_argument("--check", action="store_true", help="compare the runs with the record")
    parser.add_argument("--busy", action="store_true", help="keep all cores busy meanwhile")
    parser.add_argument("--only", metavar="NAME,...", help="these runs only")
    parser.add_argument(
        "--without-avx",
        action="store_true",
        help="compute as on a CPU without AVX, to see which digests depend on the machine",
    )
    arguments = parser.parse_args()
    names = arguments.only.split(",") if arguments.only else [run.name for run in RUNS]
    if unknown := set(names) - {run.name for run in RUNS}:
        parser.error(f"no such run: {', '.join(sorted(unknown))}")
    if arguments.write and arguments.without_avx:
        parser.error("--write records runs as this machine makes them: leave --without-avx out")
    runs = [run for run in RUNS if run.name in names]
    try:
        with _all_cores_busy() if arguments.busy else ExitStack():
            if arguments.write:
                write(runs)
                return 0
            return 0 if check(runs, _OLD_CPU if arguments.without_avx else {}) else 1
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
