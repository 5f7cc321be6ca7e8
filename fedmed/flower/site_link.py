"""A site's own connection to a SuperLink: Flower's Fleet API, in one process that stays."""

import contextlib
import logging
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Message
from flwr.proto.fab_pb2 import GetFabRequest
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest
from flwr.proto.node_pb2 import Node
from flwr.proto.run_pb2 import GetRunRequest
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_pull_object_fn_protobuf,
    make_push_object_fn_protobuf,
)
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from fedmed.flower.bundle import Bundle, read_bundle
from fedmed.flower.gate import HOLD_HEADER
from fedmed.flower.line import Headers, Line, LinkDown, LinkError, LinkRefused
from fedmed.flower.objects import Parcel, received

log = logging.getLogger("fedmed.link")

# Flower takes a node for gone after two of these without a sign of life; 10 s is its shortest.
INTERVAL = 10.0
BEAT = 4.0
# A reply is worth as much trouble as a round lasts: seconds.
PATIENCE = 60.0


@dataclass(frozen=True)
class Request:
    """What a coordinator asks of this site."""

    run: int
    message: Message


class SiteLink:
    """A site's connection.

    Args:
        address: the coordinator's HOST:PORT.
        key: the site's identity, which the coordinator has admitted.
        ca: the coordinator's CA in PEM; None: not encrypted, for tests on loopback.
        node_file: where the node's number is kept, so that a restarted site can take its own place again.
    """

    def __init__(
        self, address: str, *, key: ec.EllipticCurvePrivateKey, ca: bytes | None, node_file: Path
    ) -> None:
        self._address, self._key, self._ca, self._node_file = address, key, ca, node_file
        self._node: Node | None = None
        self._line: Line | None = None
        self._poll: Line | None = None
        self._hold = Headers(**{HOLD_HEADER: "20"})
        self._stop = threading.Event()
        self._lost: LinkError | None = None

    def connect(self) -> int:
        """Take this site's place; its number.

        Raises:
            LinkDown: nobody answers, or another process seems to hold the place: try again.
            LinkRefused: the coordinator does not know this site, or is not who it should be.
        """
        self.close()
        self._line, self._poll = self._open(), self._open(self._hold)
        node = self._taken_up(self._kept()) or self._activated()
        self._node, self._lost = Node(node_id=node), None
        self._node_file.write_text(str(node))
        self._stop = threading.Event()
        threading.Thread(target=self._beat, args=(self._line, self._node, self._stop), daemon=True).start()
        return int(node)

    def receive(self, wait: float) -> Request | None:
        """The next request, or None after at most `wait` seconds (20 at most).

        Raises:
            LinkDown: the connection is gone: connect again.
            LinkRefused: the coordinator has expelled this site.
        """
        if self._lost is not None:
            raise self._lost
        self._hold.values[HOLD_HEADER] = f"{wait:.3f}"
        answer = self._use(self._poll).call("PullMessages", PullMessagesRequest(node=self._node))
        if not answer.messages_list:
            return None
        proto, tree = answer.messages_list[0], answer.message_object_trees[0]
        run, line = proto.metadata.run_id, self._use(self._line)

        def request(what: Any) -> Any:
            return line.call("PullObject", what, patience=PATIENCE)

        try:
            pull = make_pull_object_fn_protobuf(request, self._node, run)
            message, fetched = received(proto, tree, pull)
            if fetched:
                done = ConfirmMessageReceivedRequest(
                    node=self._node, run_id=run, message_object_id=tree.object_id
                )
                line.call("ConfirmMessageReceived", done, patience=PATIENCE)
        except LinkDown:
            raise
        except Exception as error:
            # Its run has ended meanwhile, or it is none of ours.
            log.warning("a request was dropped: %s", type(error).__name__)
            return None
        return Request(run=run, message=message)

    def bundle(self, run: int) -> Bundle:
        """What the coordinator shipped with a run, read and not unpacked.

        Raises:
            LinkError: there is none, or it cannot be read.
        """
        line = self._use(self._line)
        found = line.call("GetRun", GetRunRequest(node=self._node, run_id=run), patience=PATIENCE).run
        request = GetFabRequest(node=self._node, hash_str=found.fab_hash, run_id=run)
        return read_bundle(line.call("GetFab", request, patience=PATIENCE).fab.content)

    def reply(self, request: Request, reply: Message) -> None:
        """Send a reply.

        Raises:
            LinkDown: nobody takes it.
            LinkError: nobody wants it any more: its round or its run has ended.
        """
        line = self._use(self._line)
        parcel = Parcel.of(reply)
        announced = PushMessagesRequest(
            node=self._node,
            messages_list=[parcel.proto],
            message_object_trees=[parcel.tree],
            # How long it took may tell something of the data (privacy.md, rule 19).
            clientapp_runtime_list=[0.0],
        )
        answer = line.call("PushMessages", announced, patience=PATIENCE)

        def push(what: Any) -> Any:
            return line.call("PushObject", what)

        send = make_push_object_fn_protobuf(push, self._node, request.run, answer.session_id)
        parcel.send(set(answer.objects_to_push), send, patience=PATIENCE)

    def close(self) -> None:
        """Leave the place."""
        self._stop.set()
        if self._node is not None:
            self._leave(self._node.node_id)
        for line in (self._line, self._poll):
            if line is not None:
                line.close()
        self._node = self._line = self._poll = None

    def _open(self, *interceptors: Any) -> Line:
        sign = NodeAuthHttpInterceptor(self._key, self._key.public_key())
        return Line(
            FleetHttpClient,
            self._address,
            ca=self._ca,
            component="SuperNode",
            interceptors=(*interceptors, sign),
        )

    def _use(self, line: Line | None) -> Line:
        if line is None:
            raise LinkDown(f"{self._address}: not connected")
        return line

    def _kept(self) -> int:
        try:
            return int(self._node_file.read_text())
        except (OSError, ValueError):
            return 0

    def _leave(self, node: int) -> None:
        with contextlib.suppress(LinkError):
            self._use(self._line).call("DeactivateNode", DeactivateNodeRequest(node_id=node))

    def _taken_up(self, node: int) -> int:
        """The number of this site's place where that is still known, else 0: what waits for it stays."""
        if not node:
            return 0
        beat = SendNodeHeartbeatRequest(node=Node(node_id=node), heartbeat_interval=INTERVAL)
        try:
            return node if self._use(self._line).call("SendNodeHeartbeat", beat).success else 0
        except (LinkDown, LinkRefused):
            raise
        except LinkError:
            # Of another coordinator, or of the time before this site was admitted again.
            return 0

    def _activated(self) -> int:
        public = public_key_to_bytes(self._key.public_key())
        request = ActivateNodeRequest(public_key=public, heartbeat_interval=INTERVAL)
        try:
            return int(self._use(self._line).call("ActivateNode", request).node_id)
        except (LinkDown, LinkRefused):
            raise
        except LinkError:
            raise LinkDown(
                f"{self._address}: another process holds this site's place, or held it less than "
                f"{2 * INTERVAL:.0f} s ago"
            ) from None

    def _beat(self, line: Line, node: Node, stop: threading.Event) -> None:
        beat = SendNodeHeartbeatRequest(node=node, heartbeat_interval=INTERVAL)
        while not stop.wait(BEAT):
            try:
                line.call("SendNodeHeartbeat", beat)
            except LinkDown:
                continue
            except LinkError as error:
                if not stop.is_set():
                    self._lost = error
                return
