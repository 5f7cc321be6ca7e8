"""A line to a SuperLink: Flower's HTTP clients, with failures in words of ours."""

import ssl
import time
from collections.abc import Iterator
from typing import Any, Literal, TypeVar

import httpx
from flwr.supercore.error import FlowerError
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.interceptors.http.utils import add_headers
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufClient, ProtobufRequestContext

from fedmed.errors import FedmedError
from fedmed.flower.gate import REASON_HEADER, SECRET_HEADER, Reason

Client = TypeVar("Client", bound=ProtobufClient)
# OpenSSL's X509_V_ERR_CERT_HAS_EXPIRED.
EXPIRED = 10
# The longest wait between attempts, in seconds.
LONGEST_PAUSE = 2.0
Refused = Literal[
    "unknown-node", "expelled", "clock", "replayed", "wrong-ca", "certificate-expired", "version"
]


class LinkError(FedmedError):
    """The other end cannot do what was asked."""


class LinkDown(LinkError):
    """Nobody answers, or not now: worth trying again."""


class LinkRefused(LinkError):
    """The other end is not who it should be, or does not want us: trying again changes nothing.

    Attributes:
        reason: which of `Refused`.
    """

    def __init__(self, reason: Refused, text: str) -> None:
        super().__init__(text)
        self.reason = reason


class Headers:
    """Adds headers to every request."""

    def __init__(self, **values: str) -> None:
        self.values = values

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        for name, value in self.values.items():
            add_headers(context.request, {name: value})
        return call_next(context)


class Line:
    """Calls of one of Flower's clients.

    Args:
        address: HOST:PORT.
        ca: the certificates that the other end's must descend from, in PEM; None: not encrypted.
        secret: of the coordinator, in hex; sites have none.
    """

    def __init__(
        self,
        kind: type[Client],
        address: str,
        *,
        ca: bytes | None,
        component: str,
        secret: str | None = None,
        interceptors: tuple[Any, ...] = (),
    ) -> None:
        self.address = address
        own = {SECRET_HEADER: secret} if secret is not None else {}
        self._client = kind.from_server_address(
            address,
            ca is None,
            ca,
            [RuntimeVersionHttpInterceptor(component_name=component), Headers(**own), *interceptors],
        )

    def call(self, method: str, request: Any, *, patience: float = 0.0) -> Any:
        """What a method of the other end answers.

        Args:
            patience: seconds to go on trying while nobody answers.

        Raises:
            LinkError: it failed.
        """
        for last in attempts(patience):
            try:
                return getattr(self._client, method)(request)
            except httpx.HTTPError as error:
                failure = self._failure(error)
            except ValueError as error:
                failure = LinkError(f"{self.address}: answers in another language ({error})")
            if last or not isinstance(failure, LinkDown):
                raise failure
        raise AssertionError

    def close(self) -> None:
        self._client.close()

    def _failure(self, error: httpx.HTTPError) -> LinkError:
        where = self.address
        certificate = _certificate_error(error)
        if certificate is not None and certificate.verify_code == EXPIRED:
            return LinkRefused("certificate-expired", f"{where}: its certificate has expired; renew it there: "
                               "fedmed coordinator rotate")  # fmt: skip
        if certificate is not None:
            return LinkRefused("wrong-ca", f"{where}: is not the coordinator of this CA, or goes by another name "
                               f"({certificate.verify_message})")  # fmt: skip
        if not isinstance(error, httpx.HTTPStatusError):
            return LinkDown(f"{where}: cannot be reached ({type(error).__name__})")
        status, reason = error.response.status_code, error.response.headers.get(REASON_HEADER)
        if reason == Reason.TOO_EARLY or status >= 500:
            return LinkDown(f"{where}: is not ready (status {status})")
        if reason in tuple(Reason):
            return LinkRefused(reason, f"{where}: refuses us: {reason}")
        said = FlowerError.from_json(error.response.text)
        return LinkError(f"{where}: {said.message if said else f'status {status}'}")


def attempts(patience: float) -> Iterator[bool]:
    """Whether this is the last attempt; pauses between them, ever longer."""
    end, pause = time.monotonic() + patience, 0.01
    while time.monotonic() + pause < end:
        yield False
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)
    yield True


def _certificate_error(error: BaseException | None) -> ssl.SSLCertVerificationError | None:
    """The certificate's part in a failure."""
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return error
        error = error.__cause__ or error.__context__
    return None
