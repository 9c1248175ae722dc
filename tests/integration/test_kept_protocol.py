"""A client of an earlier protocol: generated from the descriptor that was kept of it.

It knows no more than that descriptor, so what this server adds to the protocol reaches it as fields
and values without a name.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import grpc
import pytest
from blake3 import blake3
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass

from tests.processes import GENEROUS_S, ROOT, Scene

KEPT = sorted((ROOT / "protos/released").glob("*.binpb"))
NUM_ROUNDS = 2

Call = Callable[..., Any]


class KeptProtocol:
    """Message classes and calls as a descriptor set has them."""

    def __init__(self, path: Path, channel: grpc.Channel) -> None:
        pool = DescriptorPool()
        for file in FileDescriptorSet.FromString(path.read_bytes()).file:
            pool.Add(file)
        self._service = pool.FindServiceByName("fed.v1.FederationService")
        self._channel: Any = channel
        self._pool = pool

    def message(self, name: str, **fields: object) -> Any:  # noqa: ANN401  # made at run time
        """Return a message."""
        return GetMessageClass(self._pool.FindMessageTypeByName(f"fed.v1.{name}"))(**fields)

    def number(self, value: str) -> int:
        """Return the number of an enum's value."""
        for enum in self._service.file.enum_types_by_name.values():
            if value in enum.values_by_name:
                return enum.values_by_name[value].number
        raise AssertionError(f"the kept protocol has no {value}")

    def call(self, name: str, request: Any) -> Any:  # noqa: ANN401  # a message, or an iterable
        """Make a call and return its answer, or all of them as a list."""
        method = self._service.methods_by_name[name]
        answer_class = GetMessageClass(method.output_type)
        kind = (
            ("stream" if method.client_streaming else "unary")
            + "_"
            + ("stream" if method.server_streaming else "unary")
        )
        call = getattr(self._channel, kind)(
            f"/{self._service.full_name}/{name}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=answer_class.FromString,
        )
        answer = call(request, timeout=GENEROUS_S)
        return list(answer) if method.server_streaming else answer


def work_on(kept: KeptProtocol, session_id: str, order: Any) -> int:  # noqa: ANN401
    """Send the global model back as the update of an order; returns the receipt."""
    (section,) = order.sections
    parts = kept.call(
        "DownloadBlob",
        kept.message("DownloadBlobRequest", session_id=session_id, digest=section.digest),
    )
    payload = b"".join(part.data for part in parts)
    assert blake3(payload).hexdigest() == section.digest
    names = {"session_id": session_id, "order_id": order.order_id}
    reported = kept.call(
        "ReportProgress",
        kept.message("ReportProgressRequest", **names, counters={"batches": 4, "batches_total": 4}),
    )
    assert reported.directive == kept.number("DIRECTIVE_CONTINUE")
    queried = kept.call(
        "QueryUpload", kept.message("QueryUploadRequest", **names, digest=section.digest)
    )
    assert (queried.committed_bytes, queried.complete) == (0, False)
    header = {
        **names,
        "digest": section.digest,
        "size_bytes": len(payload),
        "sections": [{"name": "model", "size_bytes": len(payload)}],
        "encoding": kept.number("ENCODING_STATE_DICT"),
        "num_examples": 10,
        "num_steps": 4,
        "metrics": {"loss": 0.5, "accuracy": 0.75},
    }
    messages: Iterable[Any] = (
        kept.message("UploadUpdateRequest", header=header),
        kept.message("UploadUpdateRequest", data=payload),
    )
    receipt: int = kept.call("UploadUpdate", iter(messages)).receipt
    return receipt


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.stem)
def test_a_client_of_a_kept_protocol_finishes_a_run(scene: Scene, path: Path) -> None:
    """Every call it knows works as it did, and it learns that the run is over."""
    server = scene.server(
        *("--task", "tests.tiny_task:tiny", "--rounds", NUM_ROUNDS, "--min-clients", 1),
        *("--epochs", 1, "--farewell", GENEROUS_S),
    )
    with grpc.insecure_channel(server.address) as channel:
        kept = KeptProtocol(path, channel)
        registered = kept.call(
            "Register",
            kept.message("RegisterRequest", client_ids=[0], instance_key="key", num_examples=[10]),
        )
        rounds = []
        while True:
            work = kept.call(
                "PullWork",
                kept.message(
                    "PullWorkRequest",
                    session_id=registered.session_id,
                    wait={"seconds": registered.max_wait.seconds},
                ),
            )
            if work.state == kept.number("WORK_STATE_FINISHED"):
                break
            if work.state == kept.number("WORK_STATE_ORDER"):
                rounds.append(work.order.round)
                receipt = work_on(kept, registered.session_id, work.order)
                assert receipt == kept.number("RECEIPT_STORED")
    assert rounds == list(range(1, NUM_ROUNDS + 1))
    assert server.wait() == 0
    counted = [(entry["phase"], entry["updates"][0]["verdict"]) for entry in scene.history()]
    assert counted == [("DONE", "COUNTED")] * NUM_ROUNDS


def test_a_descriptor_is_kept() -> None:
    """The test above has something to run with."""
    assert KEPT
