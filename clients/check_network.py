"""Whether a site reaches its coordinator, may trust it, agrees with it on the time, and is admitted."""

import datetime
import email.utils
import http.client
import socket
import ssl
import time
from collections.abc import Iterator
from pathlib import Path

from clients.coordinator import CA, admission_name, host_port, is_loopback
from clients.finding import Finding
from clients.folder import SiteFolder
from clients.start import NODE, is_running, locked
from clients.status import ADVICE, is_well, status
from fedmed.errors import FedmedError
from fedmed.flower.line import LinkRefused
from fedmed.flower.site_link import SiteLink

SECONDS = 5.0
# A certificate that runs out sooner wants renewing.
FEWEST_DAYS = 14
# The coordinator refuses what is signed later than 5 s from its present.
MOST_AHEAD, MOST_BEHIND = 4.0, 60.0
# OpenSSL's X509_V_ERR_CERT_HAS_EXPIRED.
EXPIRED = 10


def check_network(site: SiteFolder) -> Iterator[Finding]:
    """What stands between the site and its coordinator, as far as one can see from here."""
    address = site.policy.coordinator
    if address is None:
        yield Finding("network", True, "no coordinator is named: runs come from this machine alone")
        return
    try:
        host, port = host_port(address)
        raw = socket.create_connection((host, port), timeout=SECONDS)
    except (OSError, FedmedError) as error:
        said = error.strerror or type(error).__name__ if isinstance(error, OSError) else str(error)
        hint = "is the coordinator running, and does the firewall let this machine out?"
        yield Finding("network", False, f"{address}: cannot be reached ({said}); {hint}")
        return
    yield Finding("network", True, f"{address}: answers")
    with raw:
        ca = site.path / CA
        if not ca.exists():
            found = _without_ca(site, address)
            yield found
            if not found.ok:
                return
            secured: socket.socket = raw
        else:
            tried = _secured(raw, host, ca)
            if isinstance(tried, Finding):
                yield tried
                return
            secured = tried
            yield _certificate(tried)
        yield _clock(secured, host)
        secured.close()
    yield _admitted(site, address)


def _without_ca(site: SiteFolder, address: str) -> Finding:
    if is_loopback(address):
        return Finding("TLS", True, "none: a coordinator on this machine, for tests (--insecure-for-testing)")
    return Finding("TLS", False, f"{site.path / CA} is missing; ask the coordinator for its ca.pem")


def _secured(raw: socket.socket, host: str, ca: Path) -> ssl.SSLSocket | Finding:
    try:
        context = ssl.create_default_context(cafile=str(ca))
        return context.wrap_socket(raw, server_hostname=host)
    except ssl.SSLCertVerificationError as error:
        if error.verify_code == EXPIRED:
            return Finding("TLS", False, f"the certificate has expired; {ADVICE['certificate-expired']}")
        return Finding("TLS", False, f"not the coordinator of {ca} ({error.verify_message}); "
                       f"{ADVICE['wrong-ca'].replace('DIR', str(ca.parent))}")  # fmt: skip
    except OSError as error:
        said = getattr(error, "reason", None) or error.strerror or type(error).__name__
        return Finding("TLS", False, f"no encrypted connection ({said}); does the coordinator use TLS?")


def _certificate(secured: ssl.SSLSocket) -> Finding:
    ends = ssl.cert_time_to_seconds(str((secured.getpeercert() or {})["notAfter"]))
    days = int((ends - time.time()) // 86_400)
    when = f"{datetime.datetime.fromtimestamp(ends, datetime.UTC):%Y-%m-%d}"
    if days < FEWEST_DAYS:
        return Finding(
            "TLS", False, f"the certificate ends in {days} days ({when}); {ADVICE['certificate-expired']}"
        )
    return Finding("TLS", True, f"the coordinator of ca.pem; its certificate ends in {days} days ({when})")


def _clock(secured: socket.socket, host: str) -> Finding:
    """This machine's clock against the one that the coordinator answers with, which has whole seconds."""
    try:
        secured.sendall(f"GET /health HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        answer = http.client.HTTPResponse(secured)
        answer.begin()
        there = email.utils.parsedate_to_datetime(answer.headers["Date"]).timestamp()
    except (OSError, http.client.HTTPException, TypeError, ValueError):
        return Finding("clock", False, "the coordinator does not say what time it is; is it one?")
    ahead = time.time() - there
    if -MOST_BEHIND < ahead < MOST_AHEAD:
        return Finding("clock", True, "agrees with the coordinator's")
    side = "ahead of" if ahead > 0 else "behind"
    return Finding("clock", False, f"{abs(ahead):.0f} s {side} the coordinator's; {ADVICE['clock']}")


def _admitted(site: SiteFolder, address: str) -> Finding:
    """Whether the coordinator knows this site: as its daemon found, or by going online for a moment."""
    if is_running(site.path):
        values = status(site.path)
        says = f"the daemon is {values['state']}"
        reason = "; ".join(str(values[key]) for key in ("reason", "next") if values.get(key))
        return Finding("admitted", is_well(values), f"{says}; {reason}" if reason else says)
    ca = site.path / CA
    try:
        # Under the lock: a daemon that starts meanwhile would lose its place.
        with locked(site.path):
            link = SiteLink(
                address,
                key=site.identity,
                ca=ca.read_bytes() if ca.exists() else None,
                node_file=site.path / NODE,
            )
            try:
                link.connect()
            finally:
                link.close()
    except LinkRefused as error:
        file = str(site.path / admission_name(site.policy.name))
        advice = ADVICE.get(error.reason, "see its log").replace("NAME.pub (it stands in DIR)", file)
        return Finding("admitted", False, f"{error}; {advice.replace('DIR', str(site.path))}")
    except FedmedError as error:
        return Finding("admitted", False, str(error))
    return Finding("admitted", True, f"as '{site.policy.name}', by this site's key")
