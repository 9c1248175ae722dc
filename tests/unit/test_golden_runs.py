"""The golden file holds every run, and a check of it finds a value that differs."""

import copy
import json

from benchmarks.golden_runs import GOLDEN_FILE, RUNS, find_differences

GOLDEN = json.loads(GOLDEN_FILE.read_text())["runs"]


def test_every_run_is_recorded_with_all_its_rounds() -> None:
    assert set(GOLDEN) == {run.name for run in RUNS}
    for record in GOLDEN.values():
        assert record["rounds"][-1]["phase"] == "DONE"
        assert record["rounds"][-1]["model_digest"] == record["final_model"]


def test_a_killed_run_made_the_models_of_its_twin() -> None:
    twins = [(run.name, run.killed_twin) for run in RUNS if run.killed_twin is not None]
    assert twins != []
    for name, twin in twins:
        assert GOLDEN[name]["final_model"] == GOLDEN[twin]["final_model"]


def test_each_value_that_differs_is_named_with_its_place() -> None:
    made = copy.deepcopy(GOLDEN["fedavg"])
    assert find_differences(GOLDEN["fedavg"], made, "fedavg") == []
    made["rounds"][1]["updates"][2]["verdict"] = "LATE"
    made["rounds"][2]["evaluation"]["top5"] = 0.5
    del made["rounds"][0]["cohort"]
    assert find_differences(GOLDEN["fedavg"], made, "fedavg") == [
        "fedavg.rounds[0].cohort: [0, 1, 2], now None",
        "fedavg.rounds[1].updates[2].verdict: 'COUNTED', now 'LATE'",
        "fedavg.rounds[2].evaluation.top5: None, now 0.5",
    ]


def test_a_round_too_many_is_a_difference() -> None:
    made = copy.deepcopy(GOLDEN["fedavg"])
    made["rounds"].append(made["rounds"][0])
    assert len(find_differences(GOLDEN["fedavg"], made, "fedavg")) == 1
