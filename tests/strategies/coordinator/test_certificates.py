"""Certificates, held against TLS itself: who is let in and who is not, before, during and after a new authority."""

import datetime
import socket
import ssl
import threading
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from fedmed.errors import ConfigError
from strategies.coordinator.certificates import (
    Authority,
    CertificateError,
    alternative,
    public_key,
    server_facts,
)

DAY = datetime.timedelta(days=1)
NOW = datetime.datetime.now(datetime.UTC)


def handshake(server: bytes, trusted: bytes, folder: Path, *, host: str = "hub.example") -> str:
    """What a site that trusts `trusted` says of a server that shows `server`: 'ok', or OpenSSL's reason."""
    path = folder / "server.pem"
    path.write_bytes(server)
    theirs = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    # As uvicorn does it, with one file for both.
    theirs.load_cert_chain(path, path)
    ours = ssl.create_default_context(cadata=trusted.decode())
    # What Python 3.13 asks for by itself.
    ours.verify_flags |= ssl.VERIFY_X509_STRICT
    left, right = socket.socketpair()

    def serve() -> None:
        try:
            theirs.wrap_socket(left, server_side=True).close()
        except OSError:
            left.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        ours.wrap_socket(right, server_hostname=host).close()
        return "ok"
    except ssl.SSLCertVerificationError as error:
        return error.verify_message
    finally:
        right.close()
        thread.join()


@pytest.fixture
def authority() -> Authority:
    return Authority.new("hub")


def test_a_site_accepts_its_own_coordinator_alone(authority: Authority, tmp_path: Path) -> None:
    server = authority.server(["hub.example", "10.1.2.3"])
    for host in ("hub.example", "10.1.2.3", "localhost", "127.0.0.1", "::1"):
        assert handshake(server, authority.trusted(), tmp_path, host=host) == "ok"
    assert "Hostname mismatch" in handshake(server, authority.trusted(), tmp_path, host="other.example")
    # Of the same name, and yet another.
    other = Authority.new("hub")
    assert "unable to get local issuer" in handshake(server, other.trusted(), tmp_path)


def test_an_expired_certificate_is_refused(authority: Authority, tmp_path: Path) -> None:
    old = Authority.new("hub", now=NOW - 400 * DAY)
    server = old.server(["hub.example"], now=NOW - 366 * DAY)
    assert "expired" in handshake(server, old.trusted(), tmp_path)
    assert handshake(old.server(["hub.example"]), old.trusted(), tmp_path) == "ok"
    ends, hosts = server_facts(authority.server(["hub.example"]))
    assert 364 * DAY < ends - NOW < 366 * DAY
    assert hosts == ["hub.example", "localhost", "127.0.0.1", "::1"]
    assert 3649 * DAY < authority.certificate.not_valid_after_utc - NOW < 3651 * DAY


def test_a_server_s_certificate_does_not_outlive_its_authority() -> None:
    old = Authority.new("hub", now=NOW - 3600 * DAY)
    ends, _ = server_facts(old.server(["hub.example"]))
    assert ends == old.certificate.not_valid_after_utc


def test_while_the_authority_changes_every_site_gets_through(authority: Authority, tmp_path: Path) -> None:
    """Those with the old ca.pem, those with both, and afterwards those with the new one alone."""
    new = authority.successor("hub")
    during = new.server(["hub.example"])
    assert handshake(during, authority.trusted(), tmp_path) == "ok"
    assert handshake(during, new.trusted(), tmp_path) == "ok"
    assert handshake(during, new.alone().trusted(), tmp_path) == "ok"
    # Both: so that a site which took the new file accepts the old certificate until the server has the new one.
    assert handshake(authority.server(["hub.example"]), new.trusted(), tmp_path) == "ok"
    after = new.alone().server(["hub.example"])
    assert handshake(after, new.trusted(), tmp_path) == "ok"
    assert handshake(after, new.alone().trusted(), tmp_path) == "ok"
    assert "unable to get local issuer" in handshake(after, authority.trusted(), tmp_path)


def test_a_server_s_certificate_signs_nothing(authority: Authority, tmp_path: Path) -> None:
    """Whoever steals the server's key cannot make another server."""
    stolen = Authority.parse(authority.pem())
    leaf = authority.server(["hub.example"])
    certificate = x509.load_pem_x509_certificate(leaf)
    from cryptography.hazmat.primitives import serialization

    key = serialization.load_pem_private_key(leaf, password=None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    rogue = Authority(key=key, certificate=certificate, crossed=certificate, former=stolen.certificate)
    assert handshake(rogue.server(["hub.example"]), authority.trusted(), tmp_path) != "ok"


def test_what_was_written_is_read_again(authority: Authority) -> None:
    for held in (authority, authority.successor("hub"), authority.successor("hub").successor("hub")):
        again = Authority.parse(held.pem())
        assert (again.pem(), again.trusted()) == (held.pem(), held.trusted())
        assert held.key.private_numbers().private_value != 0
        assert "key" not in repr(held)
    assert authority.key.curve.name == "secp384r1"
    for damaged in (
        b"",
        authority.trusted(),
        authority.pem()[:-80],
        Authority.new("x").pem() + authority.pem(),
    ):
        with pytest.raises(CertificateError, match="damaged"):
            Authority.parse(damaged)


@pytest.mark.parametrize(
    "host", ["", "a b", "256.1.1.1", "http://hub", "hub:9092", "-a", "a" * 254, "ä.example", "1.2.3"]
)
def test_what_is_no_host_is_refused(host: str) -> None:
    with pytest.raises(ConfigError, match="expected an IP address or a DNS name"):
        alternative(host)


def test_only_a_p384_public_key_is_a_site_s() -> None:
    from cryptography.hazmat.primitives import serialization

    public = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    good = ec.generate_private_key(ec.SECP384R1()).public_key().public_bytes(*public)
    assert public_key(b"# fedmed site: a\n" + good, "a.pub") == good
    for wrong in (b"", b"no key", ec.generate_private_key(ec.SECP256R1()).public_key().public_bytes(*public)):
        with pytest.raises(ConfigError, match=r"a\.pub: expected a P-384 public key"):
            public_key(wrong, "a.pub")
