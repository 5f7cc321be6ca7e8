"""What stands before Flower's SuperLink: who may ask for what, nothing twice, and waiting instead of polling.

Flower serves sites, operators and running apps on one port. Its open edition asks operators for no proof of who
they are, accepts a signed request again for five minutes, and answers a poll at once.
"""

import asyncio
import base64
import hashlib
import hmac
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any

from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_HEADER, TIMESTAMP_TOLERANCE
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER

log = logging.getLogger("fedmed.superlink")

# Proves that who asks may read the coordinator's folder; everything but the sites' own routes needs it.
SECRET_HEADER = "fedmed-secret"
# Why a site was turned away.
REASON_HEADER = "fedmed-reason"
# How long, in seconds, a poll may be held before it is answered with nothing.
HOLD_HEADER = "fedmed-hold"
# The longest: below the 30 s after which Flower's clients give up.
HOLD = 20.0
# Flower makes the error reply for a site that is gone only when somebody asks.
LOOK_AGAIN = 1.0

# Larger than any request of a site: Flower moves objects in pieces of 5 MB.
LARGEST = 16_000_000

Scope = MutableMapping[str, Any]
Event = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Event]]
Send = Callable[[Event], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class Reason(StrEnum):
    """Why a site was turned away."""

    UNKNOWN = "unknown-node"
    EXPELLED = "expelled"
    CLOCK = "clock"
    REPLAYED = "replayed"
    # Signed before this process began: it may have been seen by the one before. Asked again, it passes.
    TOO_EARLY = "too-early"


@dataclass
class Bell:
    """Rings when there may be something for those who wait."""

    rung: int = 0
    _event: asyncio.Event = field(default_factory=asyncio.Event)

    def ring(self) -> None:
        self.rung += 1
        self._event.set()
        self._event = asyncio.Event()

    async def wait(self, since: int, seconds: float) -> None:
        """Return once it has rung more than `since` times, or after so many seconds."""
        if self.rung > since:
            return
        try:
            await asyncio.wait_for(self._event.wait(), seconds)
        except TimeoutError:
            return


@dataclass
class Answer:
    """A response that was kept instead of sent."""

    events: list[Event] = field(default_factory=list)

    async def keep(self, event: Event) -> None:
        self.events.append(event)

    @property
    def empty(self) -> bool:
        """Whether it says that there is nothing: an empty protobuf message has no bytes."""
        return self.events[0]["status"] == 200 and not any(event.get("body") for event in self.events)


class Seen:
    """Who signed which time, remembered as long as it would be accepted."""

    def __init__(self) -> None:
        self._until: dict[bytes, float] = {}
        self._next = 0.0

    def again(self, request: bytes, now: float) -> bool:
        """Whether it was seen before; from now on it was."""
        if now > self._next:
            self._until = {key: until for key, until in self._until.items() if until > now}
            self._next = now + 60
        digest = hashlib.sha256(request).digest()
        seen = digest in self._until
        self._until[digest] = now + TIMESTAMP_TOLERANCE + 2 * SYSTEM_TIME_TOLERANCE
        return seen


class Gate:
    """An ASGI app around another one.

    Args:
        secret: what requests must hold that do not come from sites.
        standing: why a public key (in PEM) is no site's, or None if it is one's.
    """

    def __init__(self, app: App, *, secret: bytes, standing: Callable[[bytes], Reason | None]) -> None:
        self._app = app
        self._secret = secret
        self._standing = standing
        self._seen = Seen()
        self._began = time.time()
        self._to_sites, self._to_server, self._to_executor = Bell(), Bell(), Bell()
        # Who waits at which bell, and how long between looks.
        self._waits = {
            "/v1/fleet/pull-messages": (self._to_sites, HOLD),
            "/v1/runtime/pull-messages": (self._to_server, LOOK_AGAIN),
        }
        # How often that bell had rung when an executor last asked.
        self._asked = 0
        self._rings = {
            "/v1/runtime/push-messages": self._to_sites,
            "/v1/fleet/push-messages": self._to_server,
            "/v1/control/start-run": self._to_executor,
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path, headers = scope["path"], dict(scope["headers"])
        if len(headers) < len(scope["headers"]):
            # Of a header that stands twice Flower reads the first, and the checks below the last.
            await _answer(send, 400, {})
            return
        if path.startswith("/v1/fleet/"):
            if not _of_a_size(headers):
                # It would be read whole before anybody knows who sends it.
                log.warning("refused: a request of another size than sites send, from %s", scope["client"])
                await _answer(send, 413, {})
                return
            reason = self._turned_away(headers)
            if reason is not None:
                await self._refuse(send, 425 if reason == Reason.TOO_EARLY else 401, reason, headers)
                return
            send = self._explained(send, headers)
        elif path != "/health" and not hmac.compare_digest(
            headers.get(SECRET_HEADER.encode(), b""), self._secret
        ):
            log.warning("refused: %s without the coordinator's secret, from %s", path, scope["client"])
            await _answer(send, 403, {})
            return
        if path == "/v1/runtime/acquire-task":
            await self._awaited(scope, receive, send, _hold(headers))
            return
        if path in self._waits:
            bell, look = self._waits[path]
            await self._held(scope, receive, send, bell, look, _hold(headers))
            return
        await self._app(scope, receive, send)
        if path in self._rings:
            self._rings[path].ring()

    def _turned_away(self, headers: dict[bytes, bytes]) -> Reason | None:
        """Why a site's request is refused before Flower sees it. What is malformed is left to Flower."""
        now = time.time()
        try:
            signed = datetime.fromisoformat(headers[TIMESTAMP_HEADER.encode()].decode()).timestamp()
            # Not by the signature: of one in ECDSA anybody can make a second that is as good.
            request = (
                _decoded(headers[FLEET_HTTP_PUBLIC_KEY_HEADER.encode()]) + headers[TIMESTAMP_HEADER.encode()]
            )
        except (KeyError, ValueError):
            return None
        if not -SYSTEM_TIME_TOLERANCE < now - signed < TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE:
            return Reason.CLOCK
        if signed <= self._began:
            return Reason.TOO_EARLY
        return Reason.REPLAYED if self._seen.again(request, now) else None

    def _explained(self, send: Send, headers: dict[bytes, bytes]) -> Send:
        """Tell a site that Flower turns away whether it is unknown, or was expelled."""

        async def explained(event: Event) -> None:
            if event["type"] == "http.response.start" and event["status"] in (401, 412):
                reason = self._standing(_decoded(headers.get(FLEET_HTTP_PUBLIC_KEY_HEADER.encode(), b"")))
                if reason is not None:
                    _log_refused(reason, headers)
                    named = (REASON_HEADER.encode(), reason.encode())
                    event = {**event, "headers": [*event["headers"], named]}
            await send(event)

        return explained

    async def _refuse(self, send: Send, status: int, reason: Reason, headers: dict[bytes, bytes]) -> None:
        _log_refused(reason, headers)
        await _answer(send, status, {REASON_HEADER: reason})

    async def _held(
        self, scope: Scope, receive: Receive, send: Send, bell: Bell, look: float, hold: float
    ) -> None:
        """Answer once there is something, or with nothing after `hold` seconds."""
        body = await _body(receive)
        gone = asyncio.ensure_future(_gone(receive))
        end = time.monotonic() + hold
        try:
            while True:
                since, answer = bell.rung, Answer()
                # Flower's middlewares write into the scope.
                fresh = {**scope, "state": dict(scope.get("state", {}))}
                await self._app(fresh, _once(body), answer.keep)
                left = end - time.monotonic()
                if not answer.empty or left <= 0:
                    break
                waits = asyncio.ensure_future(bell.wait(since, min(left, look)))
                await asyncio.wait({waits, gone}, return_when=asyncio.FIRST_COMPLETED)
                waits.cancel()
                if gone.done():
                    # What is fetched for somebody who hung up would be lost.
                    return
        finally:
            gone.cancel()
        for event in answer.events:
            await send(event)

    async def _awaited(self, scope: Scope, receive: Receive, send: Send, hold: float) -> None:
        """Ask once, when a run was launched or after `hold` seconds: an executor's proof holds for one request."""
        body = await _body(receive)
        await self._to_executor.wait(self._asked, hold)
        self._asked = self._to_executor.rung
        await self._app(scope, _once(body), send)


def _of_a_size(headers: dict[bytes, bytes]) -> bool:
    length = headers.get(b"content-length", b"")
    return length.isdigit() and int(length) <= LARGEST


def _hold(headers: dict[bytes, bytes]) -> float:
    try:
        return min(HOLD, max(0.0, float(headers.get(HOLD_HEADER.encode(), HOLD))))
    except ValueError:
        return HOLD


def _decoded(key: bytes) -> bytes:
    try:
        return base64.b64decode(key)
    except ValueError:
        return b""


def _log_refused(reason: Reason, headers: dict[bytes, bytes]) -> None:
    key = hashlib.sha256(headers.get(FLEET_HTTP_PUBLIC_KEY_HEADER.encode(), b"")).hexdigest()[:16]
    level = logging.INFO if reason == Reason.TOO_EARLY else logging.WARNING
    log.log(level, "refused a site: %s (key %s)", reason, key)


async def _answer(send: Send, status: int, headers: dict[str, str]) -> None:
    named = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": named})
    await send({"type": "http.response.body", "body": b""})


async def _body(receive: Receive) -> bytes:
    parts = []
    while True:
        event = await receive()
        parts.append(event.get("body", b""))
        if not event.get("more_body"):
            return b"".join(parts)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _once(body: bytes) -> Receive:
    """What reads a request's body, and then waits as for somebody who does not hang up."""
    events: list[Event] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Event:
        if events:
            return events.pop()
        await asyncio.Event().wait()
        raise AssertionError

    return receive
