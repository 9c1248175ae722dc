"""A client with nothing but the generated stubs: one round by hand, every message printed.

    python -m fedserver --min-clients 1 --rounds 1 --epochs 1      # one terminal
    python -m examples.raw_client                                  # another

The server is the one that the argument names, or the variable FEDCLIENT_SERVER, as host:port.

It doesn't train: it gives the global model back as it came, which is a valid update. What a client
in another language has to do is what stands here, plus the training.
"""

import json
import os
import sys
import uuid

import grpc
from blake3 import blake3
from google.protobuf import text_format
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message

from fedrounds.wire.pb import federation_pb2 as pb
from fedrounds.wire.pb.federation_pb2_grpc import FederationServiceStub

_CHUNK_BYTES = 1 << 20


def show(title: str, message: Message) -> None:
    """Print a message in protobuf's text format, indented."""
    text = text_format.MessageToString(message).rstrip() or "(empty)"
    print(f"{title} {type(message).__name__}\n    " + text.replace("\n", "\n    "))


def main(target: str) -> None:
    """Take part in one round."""
    stub = FederationServiceStub(grpc.insecure_channel(target))

    registration = pb.RegisterRequest(
        client_ids=[0], instance_key=uuid.uuid4().hex, num_examples=[1000]
    )
    show("->", registration)
    session = stub.Register(registration)
    show("<-", session)

    pull = pb.PullWorkRequest(session_id=session.session_id, wait=Duration(seconds=20))
    show("->", pull)
    work = stub.PullWork(pull)
    show("<-", work)
    order = work.order

    section = order.sections[0]
    download = pb.DownloadBlobRequest(session_id=session.session_id, digest=section.digest)
    show("->", download)
    payload = b"".join(message.data for message in stub.DownloadBlob(download))
    assert blake3(payload).hexdigest() == section.digest
    print(f"<- {len(payload)} bytes in chunks; their BLAKE3 digest is the one that was asked for")
    header_size = int.from_bytes(payload[:8], "little")
    for name, entry in json.loads(payload[8 : 8 + header_size]).items():
        print(f"    {name}: {entry['dtype']} {entry['shape']}")

    query = pb.QueryUploadRequest(
        session_id=session.session_id, order_id=order.order_id, digest=section.digest
    )
    show("->", query)
    committed = stub.QueryUpload(query)
    show("<-", committed)

    header = pb.UploadUpdateRequest(
        header=pb.UploadHeader(
            session_id=session.session_id,
            order_id=order.order_id,
            digest=section.digest,
            size_bytes=len(payload),
            offset=committed.committed_bytes,
            sections=[section],
            encoding=pb.ENCODING_STATE_DICT,
            num_examples=1000,
            num_steps=0,
            metrics={"loss": 2.3},
        )
    )
    show("->", header)
    chunks = [
        pb.UploadUpdateRequest(data=payload[at : at + _CHUNK_BYTES])
        for at in range(committed.committed_bytes, len(payload), _CHUNK_BYTES)
    ]
    print(f"-> {len(chunks)} more messages with the payload's bytes")
    show("<-", stub.UploadUpdate(iter([header, *chunks])))

    show("->", pull)
    show("<-", stub.PullWork(pull))


if __name__ == "__main__":
    main(sys.argv[1] if sys.argv[1:] else os.environ.get("FEDCLIENT_SERVER", "localhost:50051"))
