"""A site as one long-lived process: it asks the coordinator for messages, and answers one at a time.

What answers is the installed ClientApp, in this process, so that models and prepared data stay. All that leaves is what
the app's gate released, or a constant. The bundle that comes with a run is only held against what is installed.
"""

import json
import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from flwr.app import Message
from flwr.clientapp import ClientApp

from clients.asked import shown
from clients.bundle import misfit
from clients.health import Health
from fedmed.errors import FedmedError, internal
from fedmed.flower.bundle import Bundle
from fedmed.flower.line import LinkDown, LinkError, LinkRefused
from fedmed.flower.node import answered, refused
from fedmed.flower.site_link import Request
from fedmed.privacy.release import Code

log = logging.getLogger("fedmed.site")

# Seconds that one question for a message may take: so long a stop may have to wait, too.
WAIT = 2.0
# Seconds between attempts to reach the coordinator, the first and the longest.
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0
# Seconds after which a stop is noticed while waiting.
STEP = 0.5
# Seconds for which a site stays after its last reply: Flower throws the reply of a site away that has left.
LINGER = 3.0
# After so many failures on a link that stands, a message or its reply is given up.
TRIES = 5
# Runs whose bundle's verdict is remembered.
REMEMBERED = 1000


class Link(Protocol):
    """A site's connection to its coordinator, as `SiteLink` is one; any method may raise `LinkError`."""

    def connect(self) -> int: ...

    def receive(self, wait: float) -> Request | None: ...

    def bundle(self, run: int) -> Bundle: ...

    def reply(self, request: Request, reply: Message) -> None: ...

    def close(self) -> None: ...


@dataclass
class _Open:
    """A message that is not dealt with yet, and its answer, once there is one."""

    request: Request
    reply: Message | None = None
    tries: int = 0


class Daemon:
    """Serves a coordinator until it is told to stop.

    Args:
        folder: of the site.
        dial: a link to the coordinator as site.yaml and ca.pem name it now.
        app: the installed ClientApp.
        sleep: waits between attempts to connect.
    """

    def __init__(
        self, folder: Path, dial: Callable[[], Link], app: ClientApp, health: Health, *,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:  # fmt: skip
        self._folder, self._dial, self._app, self._health, self._sleep = folder, dial, app, health, sleep
        self._link: Link | None = None
        self._node = 0
        self._open: _Open | None = None
        self._fits: dict[int, bool] = {}
        self._stopping = False
        self._failures = 0
        self._replied = -LINGER
        self._last = ""

    def stop(self) -> None:
        """End after the present message. Only a flag is set: a signal's handler may call it."""
        self._stopping = True

    def run(self) -> None:
        """Connect, and again where that fails; answer messages until `stop`."""
        try:
            while not self._stopping:
                try:
                    link = self._connect()
                    while not self._stopping:
                        self._turn(link)
                        self._failures = 0
                except LinkRefused as error:
                    self._lost("refused", str(error), error.reason)
                # Also of the folder: a certificate authority that is being exchanged may be half there.
                except FedmedError as error:
                    self._lost("unreachable", str(error))
                # Whatever a coordinator sends, a site that has gone away is a worse answer to it.
                except Exception as error:
                    self._lost("unreachable", internal(error))
        finally:
            self._health.now("stopping")
            self._sleep(min(LINGER, max(0.0, self._replied + LINGER - time.monotonic())))
            self._hang_up()
            log.info("stopped")

    def _connect(self) -> Link:
        self._hang_up()
        self._link = self._dial()
        self._node = self._link.connect()
        self._said("online", f"as node {self._node}")
        return self._link

    def _hang_up(self) -> None:
        if self._link is not None:
            self._link.close()
        self._link = None

    def _turn(self, link: Link) -> None:
        """Receive a message, or wait for one; answer it. What is not answered when the link fails stays open."""
        opened = self._open = self._open or self._received(link)
        if opened is None:
            self._health.now("online")
            return
        if opened.tries >= TRIES:
            log.error(
                "a message of run %d is given up after %d attempts to answer", opened.request.run, TRIES
            )
            self._open = None
            return
        opened.tries += 1
        if opened.reply is None:
            opened.reply = self._answer(link, opened.request)
            # Let go of what was asked: a large message and its answer need not be in memory while this one is sent.
            opened.request = Request(opened.request.run, opened.reply)
        try:
            link.reply(opened.request, opened.reply)
            self._replied = time.monotonic()
        except (LinkDown, LinkRefused):
            # Sent again once the coordinator is back: a site that was cut off loses no round.
            raise
        except LinkError as error:
            log.warning("the coordinator does not take an answer to run %d: %s", opened.request.run, error)
        self._open = None
        self._health.last_contact = time.time()
        self._health.now("online")

    def _received(self, link: Link) -> _Open | None:
        request = link.receive(WAIT)
        self._health.last_contact = time.time()
        return None if request is None else _Open(request)

    def _answer(self, link: Link, request: Request) -> Message:
        message, began = request.message, time.monotonic()
        run, round = asked(message)
        self._health.run, self._health.round = run, round
        self._health.now("working")
        what = f"{message.metadata.message_type}, run {shown(run or '?')}, round {round}"
        if not self._known(link, request.run):
            log.warning("refused: %s", what)
            return refused(message, Code.BUNDLE)
        # A run that waits for a person asks for its quote every few seconds.
        level = logging.DEBUG if what == self._last else logging.INFO
        self._last = what
        log.log(level, "begun: %s", what)
        reply = answered(
            self._app, message, run=request.run, node=self._node, node_config={"site-folder": str(self._folder)}
        )  # fmt: skip
        said = f" with '{reply.error.reason}'" if reply.has_error() else ""
        log.log(level, "answered%s after %.1f s: %s", said, time.monotonic() - began, what)
        return reply

    def _known(self, link: Link, run: int) -> bool:
        """Whether the run's bundle names what is installed here; asked once a run."""
        if run not in self._fits:
            try:
                found = misfit(link.bundle(run))
            except (LinkDown, LinkRefused):
                raise
            # A bundle may be broken in any way.
            except Exception as error:
                found = (
                    f"it cannot be read ({str(error) if isinstance(error, LinkError) else internal(error)})"
                )
            if found:
                log.error("run %d: its bundle is refused, and was not opened: %s", run, found)
            while len(self._fits) >= REMEMBERED:
                self._fits.pop(next(iter(self._fits)))
            self._fits[run] = found is None
        return self._fits[run]

    def _lost(self, state: str, why: str, refusal: str = "") -> None:
        """Wait before the next attempt to connect: longer each time, and not all sites at once."""
        self._said(state, why, why, refusal)
        self._failures += 1
        pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** min(self._failures - 1, 10)) * random.uniform(0.5, 1.0)
        while pause > 0 and not self._stopping:
            self._sleep(min(pause, STEP))
            pause -= STEP

    def _said(self, state: str, words: str, reason: str = "", refusal: str = "") -> None:
        """Take over a state, and log it where it is another one."""
        if self._health.now(state, reason, refusal):
            log.log(logging.INFO if state == "online" else logging.WARNING, "%s: %s", state, words)


def asked(message: Message) -> tuple[str | None, int | None]:
    """The run's own name and the round that a message is of, for people; None where it does not say."""
    try:
        values = json.loads(str(message.content.config_records["instruction"]["json"]))
        return str(values["run_id"])[:200], int(values["round"])
    # It is the coordinator's text, and is not checked yet.
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        return None, None
