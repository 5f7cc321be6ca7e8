"""Messages as the objects that Flower moves: one array in memory at a time, small contents in one piece."""

import time
from collections.abc import Callable

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.app.error import Error
from flwr.common.constant import ErrorCode
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import (
    InflatableObject,
    get_all_nested_objects,
    get_object_head_values_from_object_content,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import ObjectUnavailableError, inflatable_class_registry

from fedmed.flower.line import LinkError, attempts
from fedmed.records import array_bytes, from_bytes, to_bytes

PACKED = "packed"
# Each object costs a request. Below this size, all of a content travels as one.
SMALL = 1_000_000
# While the other end still uploads, an object is asked for this many seconds.
PATIENCE = 60.0

Push = Callable[[str, bytes], None]


def packed(content: RecordDict) -> RecordDict:
    """The same content in one record, where that is small."""
    if array_bytes(content) > SMALL:
        return content
    return RecordDict({PACKED: ConfigRecord({"content": to_bytes(content)})})


def unpacked(content: RecordDict) -> RecordDict:
    """What `packed` was given.

    Raises:
        LinkError: it is damaged.
    """
    if PACKED not in content:
        return content
    try:
        return from_bytes(bytes(content.config_records[PACKED]["content"]))
    # Whatever the other end sends, parsers may raise anything.
    except Exception as error:
        raise LinkError(f"a message's content is damaged ({type(error).__name__})") from None


def fetch(tree: ObjectTree, pull: Callable[[str], bytes]) -> Message:
    """The message at the root of a tree of objects.

    Args:
        pull: an object's bytes; raises `ObjectUnavailableError` while it is still on its way.

    Raises:
        LinkError: an object is missing or damaged.
    """
    try:
        message = _inflated(tree, pull, time.monotonic() + PATIENCE)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise LinkError(f"a message is damaged ({type(error).__name__})") from None
    if not isinstance(message, Message):
        raise LinkError("what was sent is no message")
    message.metadata.__dict__["_message_id"] = tree.object_id
    return message


def _inflated(tree: ObjectTree, pull: Callable[[str], bytes], end: float) -> InflatableObject:
    # The parts first and each of them whole, so that only one array exists twice at a time.
    children = {child.object_id: _inflated(child, pull, end) for child in tree.children}
    for _ in attempts(max(0.0, end - time.monotonic())):
        try:
            content = pull(tree.object_id)
            break
        except ObjectUnavailableError:
            continue
    else:
        raise LinkError("a part of a message did not come in time")
    kind, _, _ = get_object_head_values_from_object_content(content)
    return inflatable_class_registry[kind].inflate(content, children)


def upload(message: Message, announce: Callable[[Message, ObjectTree], tuple[set[str], Push]]) -> None:
    """Send a message: its tree, then those of its objects that the other end lacks.

    Args:
        announce: gets message and tree; answers with the lacking objects' ids, and what sends one.
    """
    message.metadata.__dict__["_message_id"] = message.object_id
    with no_object_id_recompute():
        tree, objects = get_object_tree(message), get_all_nested_objects(message)
        lacking, push = announce(message, tree)
        for key, part in objects.items():
            if key in lacking:
                push(key, part.deflate())


def failed(message: Message, reason: str) -> Message:
    """An error in the place of a reply that could not be read."""
    return Message(Error(ErrorCode.MESSAGE_UNAVAILABLE, reason), reply_to=message)
