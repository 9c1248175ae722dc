"""Published results beside ours, on full MNIST; writes docs/results.md.

    python -m benchmarks.papers --data-root FOLDER [--rows 2nn-iid,cnn-e1] [--seeds 3]
                                [--processes 2] [--work state/papers] [--until 20]
    python -m benchmarks.papers --list

Every row is a run of the service: one server process, and `--processes` client processes that
share the client ids among them (`--ids`). A run that was stopped goes on where it was when the same
command is given again: its state-dirs are in --work until it is done. One with a target ends when
that is reached, and all after round --until, which the table says then. One whose result is there
isn't repeated: delete the result first.

What came out of a run is kept in benchmarks/results, one file for each row and seed, and the tables
of docs/results.md are written anew from all of them after each (see benchmarks.paper_report).
"""

import argparse
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

from benchmarks.federation import ROOT, machine_line
from benchmarks.paper_report import RESULTS, write_page
from benchmarks.paper_rows import CLIENT_FLAGS, ROWS, Row, find_rows
from fedserver.reporting.as_json import attempt_json
from fedserver.store import Store, read_history

_LOOK_EVERY_S = 3.0
_PATIENCE_S = 60.0


def main() -> None:
    """Run the rows that were asked for, each seed in turn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-root", type=Path, help="where full MNIST is")
    parser.add_argument("--rows", default="", help="names of rows, separated by commas")
    parser.add_argument("--seeds", type=int, default=0, help="how many; 0: as many as the row says")
    parser.add_argument("--until", type=int, default=0, help="after which round; 0: the row's last")
    parser.add_argument("--processes", type=int, default=2, help="client processes")
    parser.add_argument("--work", type=Path, default=Path("state/papers"), help="state of the runs")
    parser.add_argument("--list", action="store_true", help="show the rows and what they have")
    parser.add_argument("--write", action="store_true", help="only write docs/results.md anew")
    arguments = parser.parse_args()
    if arguments.list:
        _list_rows()
        return
    if arguments.write:
        write_page()
        return
    if arguments.data_root is None:
        parser.error("--data-root is required: the folder of full MNIST")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped; the same command goes on"))
    names = [name for name in arguments.rows.split(",") if name]
    for row in find_rows(names) if names else ROWS:
        for seed in range(arguments.seeds or row.num_seeds):
            if not result_path(row, seed).exists():
                _run(row, seed, arguments)


def result_path(row: Row, seed: int) -> Path:
    """Where the result of a row's run is kept."""
    return RESULTS / f"{row.name}-{seed}.json"


def _run(row: Row, seed: int, arguments: argparse.Namespace) -> None:
    """Bring one run to its end, keep what came out, and forget its state."""
    folder = (arguments.work / f"{row.name}-{seed}").absolute()
    folder.mkdir(parents=True, exist_ok=True)
    flags = row.server_flags(seed)
    print(f"{row.name}, seed {seed}: in {folder}", file=sys.stderr)
    history = _history(folder / "server")
    last = min(row.rounds, arguments.until or row.rounds)
    if not _is_over(row, history, last):
        with _service(row, flags, folder=folder, arguments=arguments) as processes:
            history = _watch(row, folder, processes, last=last)
    record: dict[str, Any] = {
        "row": row.name,
        "seed": seed,
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "machine": machine_line(),
        "command": f"python -m fedserver {' '.join(flags)}",
        "client_processes": len(row.step_s) or arguments.processes,
        "seconds": round(sum(map(_seconds_of, history))),
        "round_ends_s": [
            round(end_s, 2) for end_s in itertools.accumulate(map(_seconds_of, history))
        ],
        "incidents": sorted(
            {incident["kind"] for entry in history for incident in entry["incidents"]}
        ),
        "num_updates": {
            verdict: sum(
                update["verdict"] == verdict for entry in history for update in entry["updates"]
            )
            for verdict in ("COUNTED", "EXCLUDED")
        },
        "accuracies": [entry["evaluation"]["accuracy"] for entry in history],
    }
    RESULTS.mkdir(exist_ok=True)
    result_path(row, seed).write_text(json.dumps(record, indent=1) + "\n")
    write_page()
    shutil.rmtree(folder)
    print(f"{row.name}, seed {seed}: done, {len(history)} rounds", file=sys.stderr)


@contextmanager
def _service(
    row: Row, flags: list[str], *, folder: Path, arguments: argparse.Namespace
) -> Iterator[list[subprocess.Popen[str]]]:
    """Start the server and the clients, new or where they were; stop them at the end.

    Raises:
        RuntimeError: the server doesn't start; the message is its log's end.
    """
    data = ["--data-root", str(arguments.data_root.absolute())]
    processes = [
        _started(
            folder / "server",
            *("fedserver", "--port", "0", "--farewell", "2", *data, *flags),
            stdout=subprocess.PIPE,
        )
    ]
    try:
        assert processes[0].stdout is not None
        first_line = processes[0].stdout.readline()
        if not first_line:
            raise RuntimeError((folder / "server.log").read_text()[-2000:])
        num_processes = len(row.step_s) or arguments.processes
        cuts = [number * row.num_clients // num_processes for number in range(num_processes + 1)]
        task = flags[flags.index("--task") + 1]
        for number, (begin, end) in enumerate(itertools.pairwise(cuts)):
            ids = f"{begin}-{end - 1}"
            client = ["fedclient", "--ids", ids, "--server", first_line.split()[-1]]
            client += ["--task", task, *data, *CLIENT_FLAGS]
            own = {"PAPER_STEP_S": str(row.step_s[number])} if row.step_s else {}
            processes.append(_started(folder / f"clients-{ids}", *client, environment=own))
        yield processes
    finally:
        for process in reversed(processes):
            process.terminate()
        for process in processes:
            try:
                process.wait(_PATIENCE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _started(
    state_dir: Path,
    module: str,
    *flags: str,
    stdout: int | None = None,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> subprocess.Popen[str]:
    with state_dir.with_name(f"{state_dir.name}.log").open("a") as log:
        return subprocess.Popen(
            [sys.executable, "-m", module, "--state-dir", str(state_dir), *flags],
            cwd=ROOT,
            env=os.environ | environment,
            text=True,
            stdout=stdout,
            stderr=log,
        )


def _watch(
    row: Row, folder: Path, processes: list[subprocess.Popen[str]], *, last: int
) -> list[dict[str, Any]]:
    """Return the history of the rounds that are done once `last` is, or the target is reached.

    Raises:
        RuntimeError: a process failed; the message names its log.
    """
    num_said = 0
    while True:
        has_ended = processes[0].poll() is not None
        history = _history(folder / "server")
        if len(history) // 10 > num_said // 10:
            num_said = len(history)
            best = max(entry["evaluation"]["accuracy"] for entry in history)
            print(f"{row.name}: round {num_said}, best {best:.4f}", file=sys.stderr)
        if _is_over(row, history, last):
            return history
        if has_ended or any(process.poll() not in (None, 0) for process in processes):
            raise RuntimeError(f"{row.name} ended before its time; see the logs in {folder}")
        time.sleep(_LOOK_EVERY_S)


def _is_over(row: Row, history: list[dict[str, Any]], last: int) -> bool:
    accuracies = [entry["evaluation"]["accuracy"] for entry in history]
    has_reached = row.target is not None and max(accuracies, default=0.0) >= row.target
    return has_reached or len(history) >= last


def _history(state_dir: Path) -> list[dict[str, Any]]:
    """Return the rounds that are done and evaluated; none where there is no run yet."""
    if not (state_dir / "federation.sqlite").exists():
        return []
    store = Store(state_dir / "federation.sqlite", read_only=True)
    try:
        run = store.runs.latest_run()
        attempts = [] if run is None else read_history(store, run)
    finally:
        store.close()
    history = [attempt_json(attempt) for attempt in attempts if attempt.is_done]
    return [entry for entry in history if entry["evaluation"]]


def _seconds_of(entry: dict[str, Any]) -> float:
    finished, started = (
        datetime.fromisoformat(entry[f"{event}_at"]) for event in ("finished", "started")
    )
    return (finished - started).total_seconds()


def _list_rows() -> None:
    for row in ROWS:
        done = [seed for seed in range(row.num_seeds) if result_path(row, seed).exists()]
        print(f"{row.name:24} {row.what:50} paper: {row.goal:8} done: {done or 'none'}")


if __name__ == "__main__":
    main()
