"""A Grid that calls a ClientApp in this process, or in worker processes forked from it: no SuperLink, no Ray.

The apps are the ones that a deployment runs.
"""

import importlib
import logging
import multiprocessing
import os
import signal
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from flwr.app import ArrayRecord, Context, Message, RecordDict
from flwr.app.error import Error
from flwr.clientapp import ClientApp
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.serverapp import ServerApp

from fedmed.flower.grid import RunGrid

log = logging.getLogger("fedmed.flower")

# Flower's own logger prints at import and in every strategy; fedmed reports by itself.
logging.getLogger("flwr").setLevel(logging.WARNING)


def load_object(reference: str) -> Any:
    """The object that `package.module:name` names."""
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)


def run_in_process(
    server_app: ServerApp,
    client_app: ClientApp,
    *,
    nodes: int | Sequence[Mapping[str, str]],
    workers: int,
    run_config: dict,
) -> None:
    """Run a ServerApp against copies of a ClientApp.

    Args:
        nodes: for each copy, what Flower's `--node-config` would hold besides its number; or how many there are.
        workers: processes that play the nodes; 1 stays in this one.
        run_config: what `flwr run --run-config` would hold.
    """
    grid = InProcessGrid(client_app, nodes=nodes, workers=workers)
    context = Context(
        run_id=1, node_id=SUPERLINK_NODE_ID, node_config={}, state=RecordDict(), run_config=run_config
    )
    try:
        server_app(grid, context)
    finally:
        grid.close()


class InProcessGrid(RunGrid):
    """A Grid whose nodes live here. A node always stays with the same worker, so that what it keeps warm stays."""

    def __init__(
        self, client_app: ClientApp, *, nodes: int | Sequence[Mapping[str, str]], workers: int = 1
    ) -> None:
        configs = [{}] * nodes if isinstance(nodes, int) else nodes
        self._app = client_app
        super().__init__(1)
        self._contexts = {
            index + 2: Context(
                run_id=1,
                node_id=index + 2,
                node_config={**config, "partition-id": index, "num-partitions": len(configs)},
                state=RecordDict(),
                run_config={},
            )
            for index, config in enumerate(configs)
        }
        self._replies: dict[str, Message] = {}
        self._requested = min(workers, len(configs))
        self._workers: list[_Worker] | None = None

    def start_workers(self) -> None:
        """Fork the workers. Call it once everything that they share has been loaded."""
        if self._workers is None and self._requested > 1:
            self._workers = []
            for _ in range(self._requested):
                earlier = [worker.connection for worker in self._workers]
                self._workers.append(_Worker(self._app, self._contexts, earlier))

    def get_node_ids(self) -> Iterable[int]:
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        pushed = list(messages)
        for reply in self.send_and_receive(pushed):
            self._replies[reply.metadata.reply_to_message_id] = reply
        return [message.metadata.message_id for message in pushed]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._replies.pop(key) for key in list(message_ids) if key in self._replies]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        return list(self.gather(messages, timeout=timeout))

    def gather(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Send messages; the replies as they come, none of which is held here. Who stops early misses the rest."""
        sent = [_identified(message) for message in messages]
        end = None if timeout is None else time.monotonic() + timeout
        self.start_workers()
        return self._call_here(sent, end) if self._workers is None else self._gather(self._workers, sent, end)

    def _call_here(self, sent: list[Message], end: float | None) -> Iterator[Message]:
        for message in sent:
            reply = _call(self._app, message, self._contexts[message.metadata.dst_node_id])
            if end is not None and time.monotonic() > end:
                return
            yield _identified(reply)
            del reply

    def _gather(self, workers: list["_Worker"], sent: list[Message], end: float | None) -> Iterator[Message]:
        waiting = {message.metadata.message_id: message for message in sent}
        batches: list[list[Message]] = [[] for _ in workers]
        for message in sent:
            batches[message.metadata.dst_node_id % len(workers)].append(message)
        while waiting:
            for worker, batch in zip(workers, batches, strict=True):
                # Only to an idle one: sending to a worker that is itself sending would block both for ever.
                if batch and worker.idle:
                    worker.send(batch, end)
                    batch.clear()
            if any(worker.dead for worker in workers):
                for key, message in list(waiting.items()):
                    if workers[message.metadata.dst_node_id % len(workers)].dead:
                        yield _identified(_unavailable(waiting.pop(key)))
            if not waiting:
                return
            busy = [worker for worker in workers if worker.busy]
            left = None if end is None else max(0.0, end - time.monotonic())
            ready = wait([worker.connection for worker in busy], left)
            if not ready:
                return
            for worker in busy:
                if worker.connection in ready:
                    key, reply = worker.receive()
                    # A reply to an earlier call, which had waited long enough, is of no use any more.
                    if reply is not None and waiting.pop(key, None) is not None:
                        yield _identified(reply)
                    # Or it would lie here while the next one is read.
                    del reply

    def close(self) -> None:
        """End the workers."""
        for worker in self._workers or []:
            worker.close()
        self._workers = None


class _Worker:
    """A forked process that plays some of the nodes, one message at a time."""

    def __init__(self, app: ClientApp, contexts: dict[int, Context], earlier: list[Connection]) -> None:
        fork = multiprocessing.get_context("fork")
        self.connection, theirs = fork.Pipe()
        self.dead = False
        # Whether it has messages that it did not deal with yet.
        self.busy = False
        ours = [*earlier, self.connection]
        self._process = fork.Process(target=_serve, args=(theirs, ours, app, contexts), daemon=True)
        self._process.start()
        theirs.close()

    @property
    def idle(self) -> bool:
        """Whether it waits for messages."""
        return not self.busy and not self.dead

    def send(self, messages: list[Message], end: float | None) -> None:
        """Give an idle worker messages, none of which it begins after `end`."""
        try:
            self.connection.send((messages, end))
            self.busy = True
        except OSError:
            self._lost()

    def receive(self) -> tuple[str, Message | None]:
        """A reply and the id of the message that it answers; None at the end of the messages or the process."""
        try:
            key, reply = self.connection.recv()
            self.busy = reply is not None
            return key, reply
        except (EOFError, OSError):
            self._lost()
            return "", None

    def _lost(self) -> None:
        self.dead, self.busy = True, False
        self._process.join(timeout=1)
        log.error("a worker process ended with code %s; its sites are unavailable", self._process.exitcode)

    def close(self) -> None:
        self.connection.close()
        self._process.join(timeout=1)
        if self._process.is_alive():
            # It holds nothing that must be put away, and a stopped process would not hear anything milder.
            self._process.kill()
            self._process.join()


def _serve(
    connection: Connection, coordinators: list[Connection], app: ClientApp, contexts: dict[int, Context]
) -> None:
    # Were the coordinator's ends open here too, a worker would not notice that the coordinator was killed.
    for end in coordinators:
        end.close()
    # Ctrl-C reaches the whole process group; the coordinator alone decides what happens then.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        try:
            messages, deadline = connection.recv()
            for message in messages:
                if deadline is None or time.monotonic() < deadline:
                    reply = _call(app, message, contexts[message.metadata.dst_node_id])
                    connection.send((message.metadata.message_id, reply))
            connection.send(("", None))
        except (EOFError, OSError):
            # Without interpreter shutdown: what was inherited from the parent is the parent's to clean up.
            os._exit(0)


def _call(app: ClientApp, message: Message, context: Context) -> Message:
    return constant_failure(_own_copy(message), context, lambda m, c: app(message=m, context=c))


def constant_failure(
    message: Message, context: Context, call_next: Callable[[Message, Context], Message]
) -> Message:
    """A Flower mod: whatever fails inside, what leaves the site is one constant (privacy.md, rule 19).

    Flower's own workers would send the exception's text.
    """
    try:
        return call_next(message, context)
    except KeyboardInterrupt:
        raise
    # Not Exception alone: a panic in Rust (tokenizers, safetensors) is none, and a library may end the process.
    except BaseException as error:
        # The text of an exception may hold data; its type and place do not.
        frame = error.__traceback__
        while frame is not None and frame.tb_next is not None:
            frame = frame.tb_next
        place = f"{frame.tb_frame.f_code.co_filename}:{frame.tb_lineno}" if frame else "?"
        log.error("a site failed: %s at %s", type(error).__name__, place)
        return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "site-failed"), reply_to=message)


def _unavailable(message: Message) -> Message:
    return Message(Error(ErrorCode.NODE_UNAVAILABLE, "node-unavailable"), reply_to=message)


def _own_copy(message: Message) -> Message:
    """Senders may share one content between messages; every node gets its own (array bytes stay shared)."""
    if message.has_content():
        message.content = RecordDict({name: _copied(record) for name, record in message.content.items()})
    return message


def _copied(record: Any) -> Any:
    if isinstance(record, ArrayRecord):
        return ArrayRecord(OrderedDict(record))
    return type(record)({key: [*v] if isinstance(v, list) else v for key, v in record.items()})


def _identified(message: Message) -> Message:
    # Flower hashes the content for an id; in one process any unique one does.
    message.metadata.__dict__["_message_id"] = uuid.uuid4().hex
    return message
