"""A link that plays a script: what a coordinator sends, and how the network fails."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from flwr.app import Message, MessageType

from clients.client_app import app
from clients.daemon import Daemon
from clients.health import Health
from fedmed.flower.bundle import Bundle, installed
from fedmed.flower.in_process import InProcessGrid
from fedmed.flower.site_link import Request
from fedmed.records import Arrays, Instruction, instruction_record

Step = Request | BaseException | Callable[[], Any] | None


def message(kind: str, asked: Instruction, arrays: Arrays | None = None) -> Message:
    """A message to node 2, as a Grid makes it."""
    InProcessGrid(app, nodes=1)
    made = Message(instruction_record(asked, arrays), 2, kind)
    made.metadata.__dict__["_message_id"] = f"{kind} {asked.run_id} {asked.round}"
    return made


def query(asked: Instruction, *, run: int = 7) -> Request:
    return Request(run, message(MessageType.QUERY, asked))


def train(asked: Instruction, arrays: Arrays, *, run: int = 7) -> Request:
    return Request(run, message(MessageType.TRAIN, asked, arrays))


class QueueLink:
    """Each call of `receive` is a step of the script: what it gives, raises, or calls. At its end the daemon is told
    to stop. `refusals` are raised by `reply`, one after the other; a None lets one pass."""

    def __init__(
        self, *steps: Step, bundle: Bundle | BaseException | None = None, refusals: Any = ()
    ) -> None:
        self.steps, self.refusals = list(steps), list(refusals)
        self.shipped = bundle or installed()
        self.connects: list[Any] = []
        self.connected = self.bundles = self.closed = 0
        self.replies: list[Message] = []
        # What each message that was handed out is answered by.
        self.handed: list[str] = []
        self.stop: Callable[[], None] = lambda: None

    def connect(self) -> int:
        self.connected += 1
        if self.connects and (fault := self.connects.pop(0)) is not None:
            raise fault
        return 2

    def receive(self, wait: float) -> Request | None:
        assert 0 < wait <= 20
        if not self.steps:
            self.stop()
            return None
        step = self.steps.pop(0)
        if isinstance(step, BaseException):
            raise step
        if callable(step):
            step()
            return None
        if step is not None:
            self.handed.append(step.message.metadata.message_id)
        return step

    def bundle(self, run: int) -> Bundle:
        assert run
        self.bundles += 1
        if isinstance(self.shipped, BaseException):
            raise self.shipped
        return self.shipped

    def reply(self, request: Request, reply: Message) -> None:
        if self.refusals and (fault := self.refusals.pop(0)) is not None:
            raise fault
        assert request.run
        assert reply.metadata.reply_to_message_id == self.handed[-1]
        self.replies.append(reply)

    def close(self) -> None:
        self.closed += 1


def serve(folder: Path, link: QueueLink, *, app: Any = app, sleep: Any = lambda _: None) -> Health:
    """Play the script to a daemon of the site; how it was in the end."""
    health = Health(folder.name, folder, "127.0.0.1:1")
    dialled: list[QueueLink] = []
    daemon = Daemon(folder, lambda: dialled.append(link) or link, app, health, sleep=sleep)  # type: ignore[func-returns-value]
    link.stop = daemon.stop
    daemon.run()
    # Of what was dialled, everything was hung up.
    assert link.closed == len(dialled) == link.connected
    return health
