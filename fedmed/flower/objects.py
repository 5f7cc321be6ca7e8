"""Messages as the objects that Flower moves: one array in memory at a time, small contents in one piece."""

import gc
import json
import math
import secrets
from collections.abc import Callable, Container
from dataclasses import dataclass

from flwr.app import Array, ConfigRecord, Message, RecordDict
from flwr.app.error import Error
from flwr.app.message import make_message, remove_content_from_message
from flwr.app.message.arraychunk import ArrayChunk
from flwr.common.constant import ErrorCode
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import (
    InflatableObject,
    get_all_nested_objects,
    get_object_body,
    get_object_children_ids_from_object_content,
    get_object_head_values_from_object_content,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPushError,
    ObjectUnavailableError,
    inflatable_class_registry,
)

from fedmed.flower.line import LinkDown, LinkError, attempts
from fedmed.records import array_bytes, from_bytes, to_bytes

PACKED = "packed"
# Each object costs requests. Below this size a content travels within its message, as one value.
SMALL = 1_000_000
# While the other end still uploads, the next object is asked for this many seconds.
PATIENCE = 60.0
# An object that may be there already is, if it is refused so often.
REFUSALS = 6

Push = Callable[[str, bytes], None]


@dataclass(frozen=True)
class Parcel:
    """A message as Flower takes it: what is announced, and the objects that follow."""

    proto: ProtoMessage
    tree: ObjectTree
    objects: dict[str, InflatableObject]

    @classmethod
    def of(cls, message: Message) -> "Parcel":
        """Pack a message, which gets its id; its content stays as it is."""
        if message.has_content() and array_bytes(message.content) <= SMALL:
            # No object follows, but Flower wants to know one by the message's id.
            message.metadata.__dict__["_message_id"] = secrets.token_hex(32)
            value = ConfigRecord({"content": to_bytes(message.content)})
            small = make_message(metadata=message.metadata, content=RecordDict({PACKED: value}))
            return cls(message_to_proto(small), ObjectTree(object_id=message.metadata.message_id), {})
        message.metadata.__dict__["_message_id"] = message.object_id
        with no_object_id_recompute():
            tree, objects = get_object_tree(message), get_all_nested_objects(message)
        return cls(message_to_proto(remove_content_from_message(message)), tree, objects)

    def send(self, lacking: Container[str], push: Push, *, patience: float = PATIENCE) -> None:
        """Send the objects that the other end lacks.

        Args:
            push: one attempt to send an object.
            patience: seconds to go on trying with each.

        Raises:
            LinkDown: an object is not taken.
        """
        for key in list(self.objects):
            part = self.objects.pop(key)
            if key in lacking:
                _send(key, part.deflate(), push, patience)
                _forget_exchanges()


def _send(key: str, content: bytes, push: Push, patience: float) -> None:
    unsure, refused = False, 0
    for last in attempts(patience):
        try:
            push(key, content)
            return
        except LinkDown:
            if last:
                raise
            # Perhaps it was the answer alone that was lost.
            unsure = True
        except ObjectPushError:
            # Flower says so when its database had no time, and of what it has already.
            refused += 1
            if unsure and refused == REFUSALS:
                return
            if last:
                raise LinkDown("a part of a message is not taken") from None


class Budget:
    """Bytes that one message may take in memory: an array may name one piece any number of times."""

    def __init__(self, most: float) -> None:
        self._left = most

    def take(self, size: int) -> None:
        """Count them.

        Raises:
            LinkError: there are too many.
        """
        self._left -= size
        if self._left < 0:
            raise LinkError("a message is larger than it may be")


def received(
    proto: ProtoMessage,
    tree: ObjectTree,
    pull: Callable[[str], bytes],
    *,
    most: float = math.inf,
    patience: float = PATIENCE,
) -> tuple[Message, bool]:
    """A message that was announced, and whether objects of it were fetched.

    Args:
        pull: an object's bytes; raises `ObjectUnavailableError` while it is still on its way.
        most: bytes that its arrays may have.
        patience: seconds to wait for each part.

    Raises:
        LinkError: it is damaged, or a part of it is missing.
    """
    message = message_from_proto(proto)
    if not message.has_content() or PACKED not in message.content:
        # Each byte is counted as it is fetched, and once more in its array.
        return _fetched(tree, pull, Budget(2 * most + SMALL), patience), True
    try:
        content = from_bytes(bytes(message.content.config_records[PACKED]["content"]))
    # Whatever the other end sends, parsers may raise anything.
    except Exception as error:
        raise LinkError(f"a message's content is damaged ({type(error).__name__})") from None
    return make_message(metadata=message.metadata, content=content), False


def _fetched(tree: ObjectTree, pull: Callable[[str], bytes], budget: Budget, patience: float) -> Message:
    try:
        message = _inflated(tree, pull, budget, patience)
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise LinkError(f"a message is damaged ({type(error).__name__})") from None
    if not isinstance(message, Message):
        raise LinkError("what was sent is no message")
    message.metadata.__dict__["_message_id"] = tree.object_id
    return message


def is_there(proto: ProtoMessage, tree: ObjectTree, pull: Callable[[str], bytes]) -> bool:
    """Whether a message that was announced has arrived: its objects are sent in order, and the root is the last."""
    if proto.content.items:
        return True
    try:
        pull(tree.object_id)
    except ObjectUnavailableError:
        return False
    return True


def _inflated(
    tree: ObjectTree, pull: Callable[[str], bytes], budget: Budget, patience: float
) -> InflatableObject:
    # The parts first and each of them whole, so that only one array exists twice at a time.
    children = {child.object_id: _inflated(child, pull, budget, patience) for child in tree.children}
    for _ in attempts(patience):
        try:
            content = pull(tree.object_id)
            _forget_exchanges()
            break
        except ObjectUnavailableError:
            continue
    else:
        raise LinkError("a part of a message did not come in time")
    budget.take(len(content))
    kind, _, _ = get_object_head_values_from_object_content(content)
    if kind == "Array":
        return _joined(content, children, budget)
    return inflatable_class_registry[kind].inflate(content, children)


def _joined(content: bytes, chunks: dict[str, InflatableObject], budget: Budget) -> Array:
    """As Flower's `Array.inflate`, which has the bytes of an array in memory three times."""
    values = json.loads(get_object_body(content, Array))
    ids = get_object_children_ids_from_object_content(content)
    parts = [chunks[ids[index]] for index in values["arraychunk_ids"]]
    if not all(isinstance(part, ArrayChunk) for part in parts):
        raise ValueError("an array is made of something else")
    budget.take(sum(len(part.data) for part in parts))
    data = b"".join(part.data for part in parts)
    return Array(dtype=values["dtype"], shape=tuple(values["shape"]), stype=values["stype"], data=data)


def _forget_exchanges() -> None:
    """Free the request and the response of an object, of up to 5 MB each.

    httpx's refer to themselves: they would lie in memory until Python next looks for cycles among old objects.
    """
    gc.collect(1)


def failed(message: Message, reason: str) -> Message:
    """An error in the place of a reply that could not be read."""
    return Message(Error(ErrorCode.MESSAGE_UNAVAILABLE, reason), reply_to=message)
