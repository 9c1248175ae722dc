"""The history as JSON, to the byte: programs read it."""

import json

from fedserver.history import AttemptHistory, OrderHistory, UpdateHistory
from fedserver.phases import OrderState, Phase
from fedserver.records import Adjustments, ClientEvaluation, Event, ModelEvaluation
from fedserver.reporting.as_json import attempt_json

ATTEMPT = AttemptHistory(
    round_number=2,
    attempt=3,
    phase=Phase.DONE,
    adjustments=Adjustments(lr_factor=0.5, num_lowered=1),
    orders=[
        OrderHistory(
            order_id="o", client_id=7, state=OrderState.COUNTED, handed_out_at=None, ended_at=2.5
        )
    ],
    updates=[
        UpdateHistory(
            order_id="o",
            client_id=7,
            staleness=0,
            num_examples=5,
            digest="aa",
            encoding="int8",
            size_bytes=25,
            verdict=OrderState.COUNTED,
            metrics={"loss": "nan", "compression_error": 0.25},
            reason=None,
            received_at=1.5,
            received_after_s=0.5,
            answered_s=None,
        )
    ],
    incidents=[Event(kind="disk-low", occurred_at=0.0, is_incident=True, fields={"free_bytes": 9})],
    num_carried_over=0,
    base_digest="bb",
    base_bytes=100,
    model_digest="cc",
    evaluation=ModelEvaluation(
        accuracy=0.5, loss=None, metrics={"f1": 0.75}, class_accuracy=[None], confusion=[[0, 1]]
    ),
    client_evaluation=ClientEvaluation(
        accuracy=0.1,
        mean=0.2,
        worst_decile=0.3,
        std=0.4,
        minimum=0.5,
        quartile_1=0.6,
        median=0.7,
        quartile_3=0.8,
        maximum=0.9,
        num_clients=1.0,
        num_examples=5.0,
        holdout=0.0,
    ),
    has_confusion=True,
    started_at=1.0,
    closed_at=2.0,
    finished_at=None,
    collected_s=1.0,
    took_s=None,
)

EXPECTED = (
    '{"round": 2, "attempt": 3, "phase": "DONE", '
    '"adjustments": {"lr_factor": 0.5, "num_lowered": 1}, "cohort": [7], '
    '"updates": [{"order_id": "o", "client": 7, "staleness": 0, "num_examples": 5, '
    '"digest": "aa", "encoding": "int8", "size_bytes": 25, "verdict": "COUNTED", '
    '"metrics": {"loss": "nan", "compression_error": 0.25}, "reason": null, '
    '"received_at": "1970-01-01T00:00:01.500000+00:00", "received_after_s": 0.5, '
    '"answered_s": null}], '
    '"compression": {"ratio": 0.25, "error": 0.25}, "carried_over": 0, "base_digest": "bb", '
    '"base_bytes": 100, "model_digest": "cc", '
    '"evaluation": {"accuracy": 0.5, "loss": null, "f1": 0.75, "class_accuracy": [null], '
    '"confusion": [[0, 1]]}, '
    '"client_evaluation": {"accuracy": 0.1, "mean": 0.2, "worst_decile": 0.3, "std": 0.4, '
    '"minimum": 0.5, "quartile_1": 0.6, "median": 0.7, "quartile_3": 0.8, "maximum": 0.9, '
    '"num_clients": 1.0, "num_examples": 5.0, "holdout": 0.0}, '
    '"started_at": "1970-01-01T00:00:01+00:00", "closed_at": "1970-01-01T00:00:02+00:00", '
    '"finished_at": null, "collected_s": 1.0, "took_s": null, '
    '"orders": [{"order_id": "o", "client": 7, "state": "COUNTED", "handed_out_at": null, '
    '"ended_at": "1970-01-01T00:00:02.500000+00:00"}], '
    '"incidents": [{"kind": "disk-low", "at": "1970-01-01T00:00:00+00:00", "client": null, '
    '"free_bytes": 9}]}'
)


def test_the_history_is_this_json() -> None:
    """Names, their order, and how times and missing values are written."""
    assert json.dumps(attempt_json(ATTEMPT)) == EXPECTED
