"""The Grid of a run over a SuperLink."""

import logging
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from flwr.app import Message
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import (
    GetNodesRequest,
    PullAppMessagesRequest,
    PushAppMessagesRequest,
)
from flwr.supercore.constant import NodeStatus
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_pull_object_fn_protobuf,
    make_push_object_fn_protobuf,
)

from fedmed.flower.gate import HOLD_HEADER
from fedmed.flower.grid import RunGrid
from fedmed.flower.line import Headers, LinkDown
from fedmed.flower.objects import SMALL, Parcel, failed, is_there, received
from fedmed.flower.tasks import PATIENCE, runtime_line
from fedmed.records import array_bytes

log = logging.getLogger("fedmed.coordinator")

# How many small messages are sent in one request.
AT_ONCE = 16
# While a large reply is on its way, whether it and others have come is asked every so many seconds.
LOOK_AGAIN = 0.5


@dataclass(frozen=True)
class _Announced:
    """A reply whose objects may still be on their way, and what it answers."""

    proto: ProtoMessage
    tree: ObjectTree
    sent: Message


class NetworkGrid(RunGrid):
    """The Grid of a run over a SuperLink: replies are taken in one at a time, as they come.

    Args:
        token: of the run's task.
        run: the run's number.
    """

    def __init__(self, address: str, *, ca: bytes | None, secret: bytes, token: str, run: int) -> None:
        self._line = runtime_line(address, ca, secret, token)
        self._hold = Headers(**{HOLD_HEADER: "20"})
        self._poll = runtime_line(address, ca, secret, token, self._hold)
        super().__init__(run)
        self._node = Node(node_id=SUPERLINK_NODE_ID)
        self._pushed: dict[str, Message] = {}

    def sites(self) -> dict[str, int]:
        """The admitted sites that are online, by the names that they were admitted under."""
        answer = self._line.call("GetNodes", GetNodesRequest(), patience=PATIENCE)
        return {node.name: node.node_id for node in answer.nodes if node.status == NodeStatus.ONLINE}

    def gather(self, messages: Iterable[Message], *, timeout: float | None) -> Iterator[Message]:
        """Send messages, and yield the replies as they come; after `timeout` seconds no more.

        A message that was not fetched by then is never delivered: nobody works for a round that is over.

        Raises:
            LinkError: the SuperLink cannot be reached for two minutes, or the run was stopped.
        """
        end = time.monotonic() + (timeout or 3e9)
        waits = self._push(messages, timeout)
        coming: list[_Announced] = []
        while (waits or coming) and (left := end - time.monotonic()) > 0:
            # Whoever still uploads a large reply holds up nobody whose reply is there.
            hold = min(LOOK_AGAIN if coming else 20.0, left)
            if waits:
                coming += self._announced(waits, hold=hold)
            else:
                time.sleep(hold)
            for announced in [one for one in coming if self._is_there(one)]:
                coming.remove(announced)
                # Whatever was sent before its root is there too.
                yield self._reply(announced, patience=0.0)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        return list(self.gather(messages, timeout=timeout))

    def _push(self, messages: Iterable[Message], ttl: float | None = None) -> dict[str, Message]:
        """Send messages; they by their ids."""
        small: list[tuple[Parcel, Message]] = []
        sent = {}
        for message in messages:
            if ttl is not None:
                message.metadata.__dict__["_ttl"] = ttl
            parcel = Parcel.of(message)
            sent[message.metadata.message_id] = message
            if parcel.objects:
                # One at a time: a large one is in memory as long as it is being sent.
                self._announce([parcel])
            else:
                small.append((parcel, message))
        for start in range(0, len(small), AT_ONCE):
            self._announce([parcel for parcel, _ in small[start : start + AT_ONCE]])
        return sent

    def _announce(self, parcels: list[Parcel]) -> None:
        request = PushAppMessagesRequest(
            messages_list=[parcel.proto for parcel in parcels],
            message_object_trees=[parcel.tree for parcel in parcels],
        )
        answer = self._line.call("PushMessages", request, patience=PATIENCE)

        def push(what: Any) -> Any:
            return self._line.call("PushObject", what)

        send = make_push_object_fn_protobuf(push, self._node, self._run.run_id, answer.session_id)
        for parcel in parcels:
            parcel.send(set(answer.objects_to_push), send, patience=PATIENCE)

    def _announced(self, waits: dict[str, Message], *, hold: float) -> "list[_Announced]":
        """The replies that were announced, once there are any; what they answer is taken out of `waits`."""
        self._hold.values[HOLD_HEADER] = f"{hold:.3f}"
        answer = self._poll.call("PullMessages", PullAppMessagesRequest(message_ids=waits), patience=PATIENCE)
        found = zip(answer.messages_list, answer.message_object_trees, strict=True)
        return [
            _Announced(proto, tree, sent)
            for proto, tree in found
            if (sent := waits.pop(proto.metadata.reply_to_message_id, None)) is not None
        ]

    def _pull(self, key: str) -> bytes:
        """An object's bytes; raises Flower's `ObjectUnavailableError` while it is still on its way."""

        def request(what: Any) -> Any:
            return self._line.call("PullObject", what, patience=PATIENCE)

        return make_pull_object_fn_protobuf(request, self._node, self._run.run_id)(key)

    def _is_there(self, announced: "_Announced") -> bool:
        try:
            return is_there(announced.proto, announced.tree, self._pull)
        except LinkDown:
            raise
        except Exception:
            # `_reply` says so.
            return True

    def _reply(self, announced: "_Announced", patience: float) -> Message:
        sent, tree = announced.sent, announced.tree
        try:
            # An answer holds no more than what was asked about, or what stands in a message of its own.
            most = array_bytes(sent.content) + SMALL
            reply, fetched = received(announced.proto, tree, self._pull, most=most, patience=patience)
            if fetched:
                done = ConfirmMessageReceivedRequest(
                    node=self._node, run_id=self._run.run_id, message_object_id=tree.object_id
                )
                self._line.call("ConfirmMessageReceived", done, patience=PATIENCE)
            return reply
        except LinkDown:
            raise
        # Whatever a site sends must not end the run.
        except Exception as error:
            log.warning("a reply could not be read (%s)", type(error).__name__)
            return failed(sent, "unreadable")

    def get_node_ids(self) -> Iterable[int]:
        return list(self.sites().values())

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        pushed = self._push(messages)
        self._pushed |= pushed
        return list(pushed)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        waits = {key: self._pushed[key] for key in message_ids if key in self._pushed}
        announced = self._announced(waits, hold=0.0) if waits else []
        for one in announced:
            del self._pushed[one.sent.metadata.message_id]
        return [self._reply(one, patience=PATIENCE) for one in announced]

    def close(self) -> None:
        """Hang up."""
        self._line.close()
        self._poll.close()
