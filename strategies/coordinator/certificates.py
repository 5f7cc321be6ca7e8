"""The coordinator's certificate authority and its server certificate: P-384, nobody else's signature needed.

A site trusts `ca.pem` alone. When the authority is replaced, the new one carries a certificate that the one before
signed (a cross-certificate), so that sites with either of them accept the same server.
"""

import contextlib
import datetime
import ipaddress
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedmed.errors import ConfigError, FedmedError, require

AUTHORITY_DAYS, SERVER_DAYS = 3650, 365
# Clocks of sites may be behind.
EARLIER = datetime.timedelta(hours=1)
# The names by which this machine calls itself.
LOOPBACK = ("localhost", "127.0.0.1", "::1")
Key = ec.EllipticCurvePrivateKey


class CertificateError(FedmedError):
    """A certificate or its key cannot be used as it is."""


@dataclass(frozen=True, kw_only=True)
class Authority:
    """A certificate authority; with that of the one before it while sites still trust that one alone."""

    key: Key = field(repr=False)
    certificate: x509.Certificate
    # This authority's key, signed by the former one; and the former one's own certificate.
    crossed: x509.Certificate | None = None
    former: x509.Certificate | None = None

    @classmethod
    def new(cls, name: str, *, now: datetime.datetime | None = None) -> "Authority":
        """A new authority, valid for 10 years."""
        key = ec.generate_private_key(ec.SECP384R1())
        # Two authorities of one coordinator must not have one name: a path would be looked for at the wrong one.
        subject = _name(f"{name[:40]} fedmed CA {secrets.token_hex(4)}")
        return cls(key=key, certificate=_ca(subject, key, subject, key, path_length=1, now=_now(now)))

    def successor(self, name: str, *, now: datetime.datetime | None = None) -> "Authority":
        """A new authority that sites with this one's certificate accept too."""
        new = Authority.new(name, now=now)
        crossed = _ca(
            new.certificate.subject, new.key, self.certificate.subject, self.key, path_length=0, now=_now(now)
        )
        return Authority(key=new.key, certificate=new.certificate, crossed=crossed, former=self.certificate)

    def alone(self) -> "Authority":
        """This authority once every site trusts it."""
        return Authority(key=self.key, certificate=self.certificate)

    def pem(self) -> bytes:
        """All of it, with its secret key, in PEM: what `parse` reads."""
        rest = [held for held in (self.crossed, self.former) if held is not None]
        return _key_pem(self.key) + b"".join(map(_pem, [self.certificate, *rest]))

    @classmethod
    def parse(cls, pem: bytes) -> "Authority":
        """What `pem` wrote.

        Raises:
            CertificateError: it is something else.
        """
        try:
            key = serialization.load_pem_private_key(pem, password=None)
            held = x509.load_pem_x509_certificates(pem)
        except (ValueError, TypeError):
            key, held = None, []
        if not isinstance(key, Key) or len(held) not in (1, 3) or held[0].public_key() != key.public_key():
            raise CertificateError("damaged, expected an authority's key and certificates in PEM")
        return cls(key=key, certificate=held[0], **dict(zip(("crossed", "former"), held[1:], strict=False)))

    def trusted(self) -> bytes:
        """`ca.pem`: what sites trust, in PEM, this authority's own certificate first."""
        return b"".join(_pem(held) for held in (self.certificate, self.former) if held is not None)

    def server(self, hosts: Sequence[str], *, now: datetime.datetime | None = None) -> bytes:
        """A new server key with its certificate, valid for a year, in one PEM: the chain, then the key.

        One file, so that a server never finds the one without the other.

        Args:
            hosts: DNS names and IP addresses by which sites reach the server; those of this machine are added.

        Raises:
            ConfigError: one of them is neither.
        """
        key, begins = ec.generate_private_key(ec.SECP384R1()), _now(now)
        names = [alternative(host) for host in dict.fromkeys([*hosts, *LOOPBACK])]
        ends = min(begins + datetime.timedelta(days=SERVER_DAYS), self.certificate.not_valid_after_utc)
        certificate = (
            _builder(_name("fedmed coordinator"), key, self.certificate.subject, self.key, begins, ends)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(digital_signature=True), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .sign(self.key, hashes.SHA384())
        )
        chain = [certificate] if self.crossed is None else [certificate, self.crossed]
        return b"".join(map(_pem, chain)) + _key_pem(key)


def alternative(host: str) -> x509.GeneralName:
    """A host as a certificate names it.

    Raises:
        ConfigError: it is neither an IP address nor a DNS name.
    """
    with contextlib.suppress(ValueError):
        return x509.IPAddress(ipaddress.ip_address(host))
    label = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
    ok = len(host) <= 253 and re.fullmatch(rf"(\*\.)?{label}(\.{label})*", host, re.ASCII | re.IGNORECASE)
    # What looks like an address and is none would never match.
    require(
        bool(ok) and not re.fullmatch(r"[0-9.]+", host), "host", host or "''", "an IP address or a DNS name"
    )
    return x509.DNSName(host)


def server_facts(pem: bytes) -> tuple[datetime.datetime, list[str]]:
    """Until when a server certificate is valid, and the hosts that it names.

    Raises:
        CertificateError: it is none.
    """
    try:
        certificate = x509.load_pem_x509_certificates(pem)[0]
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (ValueError, x509.ExtensionNotFound):
        raise CertificateError("damaged, expected a server's certificate in PEM") from None
    return certificate.not_valid_after_utc, [str(name.value) for name in names]


def public_key(pem: bytes, where: str) -> bytes:
    """A site's public key, checked, in PEM.

    Raises:
        ConfigError: it is no public key on P-384.
    """
    try:
        key = serialization.load_pem_public_key(pem)
    except (ValueError, TypeError):
        key = None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise ConfigError(
            f"{where}: expected a P-384 public key in PEM, as fedmed site init wrote it to NAME.pub"
        )
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def _now(now: datetime.datetime | None) -> datetime.datetime:
    return now or datetime.datetime.now(datetime.UTC)


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _builder(
    subject: x509.Name,
    key: Key,
    issuer: x509.Name,
    signer: Key,
    begins: datetime.datetime,
    ends: datetime.datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder(issuer_name=issuer, subject_name=subject, public_key=key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begins - EARLIER)
        .not_valid_after(ends)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False
        )
    )


def _ca(
    subject: x509.Name, key: Key, issuer: x509.Name, signer: Key, *, path_length: int, now: datetime.datetime
) -> x509.Certificate:
    ends = now + datetime.timedelta(days=AUTHORITY_DAYS)
    return (
        _builder(subject, key, issuer, signer, now, ends)
        .add_extension(x509.BasicConstraints(ca=True, path_length=path_length), critical=True)
        .add_extension(_usage(key_cert_sign=True, crl_sign=True), critical=True)
        .sign(signer, hashes.SHA384())
    )


def _usage(**used: bool) -> x509.KeyUsage:
    every = ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
             "key_cert_sign", "crl_sign", "encipher_only", "decipher_only")  # fmt: skip
    return x509.KeyUsage(**{name: used.get(name, False) for name in every})


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: Key) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
