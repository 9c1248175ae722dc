"""A client as the server sees one: the calls of the protocol, made by hand."""

import queue
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, cast

import grpc
import pytest
import torch
from google.protobuf.duration_pb2 import Duration
from torch import Tensor

from fedrounds.tensors.codec import decode_state, digest_bytes, encode_state
from fedrounds.wire.pb import federation_pb2 as pb
from fedrounds.wire.pb.federation_pb2_grpc import FederationServiceStub
from tests.processes import GENEROUS_S, wait_until

State = dict[str, Tensor]


class Peer:
    """One client id with a session and a connection of its own."""

    def __init__(self, address: str, client_id: int, *, num_examples: int = 10) -> None:
        options = [
            # Without a pool of its own a channel shares its connection with others of this process.
            ("grpc.use_local_subchannel_pool", 1),
            # The probe would open a stream's window wide though nobody reads from it.
            ("grpc.http2.bdp_probe", 0),
        ]
        self.channel = grpc.insecure_channel(address, options)
        self.stub = FederationServiceStub(self.channel)
        self.client_id = client_id
        self.instance_key = f"instance-{client_id}"
        self.session_id = ""
        if num_examples:
            self.session_id = self.register(num_examples=[num_examples]).session_id

    def register(self, **changes: object) -> pb.RegisterResponse:
        """Register this id, with some fields of the request changed."""
        fields: dict[str, Any] = {
            "client_ids": [self.client_id],
            "instance_key": self.instance_key,
        }
        return self.stub.Register(pb.RegisterRequest(**(fields | changes)), timeout=GENEROUS_S)

    def pull(self, *, wait_s: int = 20) -> pb.PullWorkResponse:
        """Pull once."""
        return self.stub.PullWork(
            pb.PullWorkRequest(session_id=self.session_id, wait=Duration(seconds=wait_s)),
            timeout=GENEROUS_S,
        )

    def pull_order(self) -> pb.WorkOrder:
        """Pull until there is an order."""
        deadline = time.monotonic() + GENEROUS_S
        while (work := self.pull()).state == pb.WORK_STATE_WAIT:
            assert time.monotonic() < deadline, f"no order for client {self.client_id}"
        assert work.state == pb.WORK_STATE_ORDER, work
        return work.order

    def download_parts(self, digest: str, *, offset: int = 0) -> Iterator[bytes]:
        """Yield a blob's bytes from `offset` on, as they come."""
        request = pb.DownloadBlobRequest(session_id=self.session_id, digest=digest, offset=offset)
        for answer in self.stub.DownloadBlob(request, timeout=GENEROUS_S):
            yield answer.data

    def download(self, digest: str, *, offset: int = 0) -> bytes:
        """Return a blob's bytes from `offset` on."""
        return b"".join(self.download_parts(digest, offset=offset))

    def base_of(self, order: pb.WorkOrder) -> State:
        """Return the global model an order starts from."""
        return decode_state(self.download(order.sections[0].digest))

    def query(self, order: pb.WorkOrder, payload: bytes) -> pb.QueryUploadResponse:
        """Ask how much of a payload is committed."""
        return self.stub.QueryUpload(
            pb.QueryUploadRequest(
                session_id=self.session_id,
                order_id=order.order_id,
                digest=digest_bytes(payload),
            ),
            timeout=GENEROUS_S,
        )

    def header(
        self, order: pb.WorkOrder, payload: bytes, **changes: object
    ) -> pb.UploadUpdateRequest:
        """Return a good upload's first message, with some fields of it changed."""
        fields: dict[str, Any] = {
            "session_id": self.session_id,
            "order_id": order.order_id,
            "digest": digest_bytes(payload),
            "size_bytes": len(payload),
            "sections": [pb.Section(name="model", size_bytes=len(payload))],
            "encoding": pb.ENCODING_STATE_DICT,
            "num_examples": 10,
            "num_steps": 4,
            "metrics": {"loss": 0.5, "accuracy": 0.75},
        }
        return pb.UploadUpdateRequest(header=pb.UploadHeader(**(fields | changes)))

    def upload(
        self,
        order: pb.WorkOrder,
        payload: bytes,
        *,
        offset: int = 0,
        sent: bytes | None = None,
        **changes: object,
    ) -> pb.UploadUpdateResponse:
        """Upload a payload from the header's offset on, or the bytes `sent` in its place."""
        header = self.header(order, payload, offset=offset, **changes)
        rest = payload[offset:] if sent is None else sent
        messages = [header, pb.UploadUpdateRequest(data=rest)]
        return self.stub.UploadUpdate(iter(messages), timeout=GENEROUS_S)

    def stream(self, order: pb.WorkOrder, payload: bytes, **changes: object) -> "SlowUpload":
        """Begin an upload whose data the test hands over piece by piece."""
        return SlowUpload(self, order, payload, self.header(order, payload, **changes))

    def stream_in_line(self, order: pb.WorkOrder, payload: bytes) -> "SlowUpload":
        """Begin an upload that the server has seen by now, whether it has a slot for it or not."""
        pair = [self.stream(order, payload) for _ in range(2)]
        # The newer one ends the older one, whichever of them came first.
        wait_until(lambda: any(upload.is_done for upload in pair), what="the older stream to end")
        newer, older = sorted(pair, key=lambda upload: upload.is_done)
        expect_status(grpc.StatusCode.ABORTED, older.result, match="a newer upload")
        return newer

    def report(
        self,
        order: pb.WorkOrder,
        *,
        batches: int = 0,
        incidents: Sequence[pb.Incident] = (),
        gave_up: bool = False,
    ) -> int:
        """Report progress and return the directive."""
        request = pb.ReportProgressRequest(
            session_id=self.session_id,
            order_id=order.order_id,
            counters=pb.Counters(batches=batches),
            incidents=incidents,
            gave_up=gave_up,
        )
        return self.stub.ReportProgress(request, timeout=GENEROUS_S).directive

    def leave(
        self,
        reason: pb.LeaveReason.ValueType,
        *,
        client_ids: Sequence[int] = (),
        coming_back: bool = False,
        kept_order_ids: Sequence[str] = (),
    ) -> None:
        """Say goodbye for some ids of the session, or for all."""
        request = pb.LeaveRequest(
            session_id=self.session_id,
            client_ids=client_ids,
            reason=reason,
            coming_back=coming_back,
            kept_order_ids=kept_order_ids,
        )
        self.stub.Leave(request, timeout=GENEROUS_S)

    def come_back(self, *, num_examples: int = 10) -> None:
        """Register again, as a client that is started again."""
        self.session_id = self.register(num_examples=[num_examples]).session_id

    def close(self) -> None:
        """End the connection."""
        self.channel.close()


class SlowUpload:
    """An upload that is under way; `send` hands over data, `finish` ends it."""

    def __init__(
        self, peer: Peer, order: pb.WorkOrder, payload: bytes, header: pb.UploadUpdateRequest
    ) -> None:
        self._peer, self._order, self._payload = peer, order, payload
        self._messages: queue.Queue[pb.UploadUpdateRequest | None] = queue.Queue()
        self._messages.put(header)
        # Keyword arguments and futures of streams are missing in the generated annotations.
        begin = cast(Any, peer.stub.UploadUpdate).future
        self._call: grpc.Future[Any] = begin(iter(self._messages.get, None), timeout=GENEROUS_S)

    def send(self, data: bytes) -> None:
        """Hand over data; returns at once."""
        self._messages.put(pb.UploadUpdateRequest(data=data))

    def send_message(self, message: pb.UploadUpdateRequest) -> None:
        """Hand over any message."""
        self._messages.put(message)

    def wait_until_committed(self, num_bytes: int) -> None:
        """Return once the server has that many bytes of the payload."""
        wait_until(
            lambda: self._peer.query(self._order, self._payload).committed_bytes == num_bytes,
            what=f"{num_bytes} bytes to be committed",
        )

    def cancel(self) -> None:
        """Break the stream."""
        self._call.cancel()
        self._messages.put(None)

    @property
    def is_done(self) -> bool:
        """Whether the server has ended the call."""
        return self._call.done()

    def result(self) -> pb.UploadUpdateResponse:
        """Return the receipt without ending the stream from this side."""
        return cast(pb.UploadUpdateResponse, self._call.result(timeout=GENEROUS_S))

    def finish(self) -> pb.UploadUpdateResponse:
        """End the stream and return the receipt."""
        self._messages.put(None)
        return self.result()


@dataclass(frozen=True)
class OpenRound:
    """A round that collects: who takes part, with which order, from which model."""

    peers: Mapping[int, Peer]
    orders: Mapping[int, pb.WorkOrder]
    base: State

    def settle(self, *client_ids: int) -> list[int]:
        """Upload a good update for these clients, or for all; returns the receipts."""
        payload = encode_state(self.base)
        return [
            self.peers[client_id].upload(self.orders[client_id], payload).receipt
            for client_id in client_ids or self.peers
        ]


def open_round(peers: Mapping[int, Peer], *, attempt: tuple[int, int] | None = None) -> OpenRound:
    """Pull the orders of the round that is open, or the next one to be.

    With an `attempt`, a round and its number, orders of others are passed over until that is open.
    """
    deadline = time.monotonic() + GENEROUS_S

    def pull(peer: Peer) -> pb.WorkOrder:
        while (order := peer.pull_order()) and attempt not in (None, (order.round, order.attempt)):
            assert time.monotonic() < deadline, f"no order of attempt {attempt}: {order}"
        return order

    with ThreadPoolExecutor(len(peers)) as threads:
        orders = dict(zip(peers, threads.map(pull, peers.values()), strict=True))
    assert len({(order.round, order.attempt) for order in orders.values()}) == 1
    first = next(iter(peers))
    return OpenRound(peers=peers, orders=orders, base=peers[first].base_of(orders[first]))


def entry_of(history: list[dict[str, Any]], order: pb.WorkOrder) -> dict[str, Any]:
    """Return the history's entry of the attempt that an order belongs to."""
    (entry,) = (
        entry
        for entry in history
        if (entry["round"], entry["attempt"]) == (order.round, order.attempt)
    )
    return entry


def changed(base: State, by: float = 0.01) -> State:
    """Return a model a little away from `base`, as training would leave it."""
    return {
        name: tensor + by if tensor.is_floating_point() else tensor.clone()
        for name, tensor in base.items()
    }


def payload_of(state: State) -> bytes:
    """Return the bytes to upload."""
    return encode_state(state)


def is_finite(state: State) -> bool:
    """Return whether every number of a model is."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in state.values())


def expect_status(
    code: grpc.StatusCode, call: Callable[[], object], *, match: str | None = None
) -> str:
    """Make a call that must end with this status, and return the sentence beside it."""
    with pytest.raises(grpc.RpcError, match=match) as caught:
        call()
    ended = cast(grpc.Call, caught.value)
    assert ended.code() == code, f"{ended.code()}: {ended.details()}"
    return ended.details() or ""


def each_method(peer: Peer, order_id: str, digest: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield every call that names a session, by name, as `peer` makes it."""
    stub, session_id = peer.stub, peer.session_id
    yield "PullWork", lambda: stub.PullWork(pb.PullWorkRequest(session_id=session_id))
    yield (
        "DownloadBlob",
        lambda: list(
            stub.DownloadBlob(pb.DownloadBlobRequest(session_id=session_id, digest=digest))
        ),
    )
    header = pb.UploadHeader(
        session_id=session_id,
        order_id=order_id,
        digest=digest,
        encoding=pb.ENCODING_STATE_DICT,
    )
    yield "UploadUpdate", lambda: stub.UploadUpdate(iter([pb.UploadUpdateRequest(header=header)]))
    yield (
        "QueryUpload",
        lambda: stub.QueryUpload(
            pb.QueryUploadRequest(session_id=session_id, order_id=order_id, digest=digest)
        ),
    )
    yield (
        "Leave",
        lambda: stub.Leave(pb.LeaveRequest(session_id=session_id, reason=pb.LEAVE_REASON_STOPPED)),
    )
    yield (
        "ReportProgress",
        lambda: stub.ReportProgress(
            pb.ReportProgressRequest(session_id=session_id, order_id=order_id)
        ),
    )
