"""A site's folder: its policy, its secret split key and its signing identity, for its owner's eyes alone."""

import secrets
import shlex
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import ValidationError

from clients.coordinator import CA, admission, admission_name, check_ca
from clients.policy import Policy
from clients.policy_file import read_policy, render
from fedmed import secret_folder
from fedmed.data.split import KEY_BYTES
from fedmed.errors import FedmedError
from fedmed.privacy.ledger import new_ledger

POLICY, KEY, IDENTITY, LEDGER = "site.yaml", "key", "identity.pem", "ledger.db"
FILES = (KEY, IDENTITY, LEDGER, POLICY)


class SiteError(FedmedError):
    """A site's folder cannot be made or used as it is."""


@dataclass(frozen=True, kw_only=True)
class SiteFolder:
    """An opened site: its policy as it was when the folder was opened, and its secrets.

    Whatever prints this object shows no secret.
    """

    path: Path
    policy: Policy
    # The secret of the site's split and of its keyed hashes; never leaves the site.
    split_key: bytes = field(repr=False)
    _identity: ec.EllipticCurvePrivateKey = field(repr=False)

    @classmethod
    def init(
        cls, path: Path, *, name: str, coordinator: str | None = None, ca: bytes | None = None
    ) -> "SiteFolder":
        """Make a site with new secrets and the default policy, in a new or an empty folder.

        Either the whole site is there afterwards, or nothing new. The folder is 0700, its files 0600.

        Args:
            coordinator: HOST:PORT of a consortium's; the folder then also holds what it is given to admit the site.
            ca: the coordinator's certificate authority, in PEM.

        Raises:
            SiteError: the folder holds a site or other files, or cannot be written, or the name cannot be a site's.
            ConfigError: the certificate is none.
        """
        try:
            Policy(name=name)
        except ValidationError:
            raise SiteError(f"name={name!r}: expected 1 to 100 printable characters") from None
        try:
            policy = Policy(name=name, coordinator=coordinator)
        except ValidationError:
            raise SiteError(
                f"coordinator={coordinator!r}: expected HOST:PORT, e.g. fl.example.org:9092"
            ) from None
        if ca is not None:
            check_ca(ca)
        contents = {
            KEY: secrets.token_bytes(KEY_BYTES),
            IDENTITY: _new_identity(),
        }
        identity = serialization.load_pem_private_key(contents[IDENTITY], password=None)
        assert isinstance(identity, ec.EllipticCurvePrivateKey)
        new = cls(path=path, policy=policy, split_key=contents[KEY], _identity=identity)
        try:
            if (path / POLICY).exists():
                raise SiteError(
                    f"{path}: holds a site already; show it with: fedmed site policy {shlex.quote(str(path))}"
                )
            contents[LEDGER] = new_ledger(new, site=name)
            if ca is not None:
                contents[CA] = ca
            if coordinator is not None:
                contents[admission_name(name)] = admission(name, new.public_key)
            # Last: a folder with a site.yaml is whole.
            contents[POLICY] = render(policy).encode()
            secret_folder.make(path, contents, error=SiteError)
        except OSError as error:
            raise SiteError(f"{path}: a site cannot be made there ({error.strerror})") from None
        return cls.open(path)

    @classmethod
    def open(cls, path: Path) -> "SiteFolder":
        """The site in a folder.

        Raises:
            SiteError: there is none, a file is missing or damaged, or others than the owner may read it.
            PolicyError: its site.yaml cannot be used.
        """
        try:
            present = {name for name in FILES if (path / name).is_file()}
            if present:
                secret_folder.check_modes(path, FILES, error=SiteError)
        except OSError as error:
            raise SiteError(f"{path}: cannot be read ({error.strerror})") from None
        if not present:
            again = f"fedmed site init {shlex.quote(str(path))} --name NAME"
            raise SiteError(f"{path}: no site there; make one with: {again}")
        missing = [name for name in FILES if name not in present]
        if missing:
            raise SiteError(f"{path}: damaged, without {' and '.join(missing)}; restore it from a backup")
        key = _read(path / KEY)
        if len(key) != KEY_BYTES:
            # Another key would move patients between the training and the test part.
            raise SiteError(f"{path / KEY}: damaged, expected {KEY_BYTES} bytes; restore it from a backup")
        identity = _private_key(path / IDENTITY)
        return cls(path=path, policy=read_policy(path / POLICY), split_key=key, _identity=identity)

    @property
    def identity(self) -> ec.EllipticCurvePrivateKey:
        """The key by which the site's node is known to its coordinator; never leaves the site."""
        return self._identity

    @property
    def public_key(self) -> bytes:
        """The public half of the identity, in PEM: what `verify` takes."""
        return self._identity.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )

    def sign(self, data: bytes) -> bytes:
        """The site's signature of `data`: ECDSA over P-384 with SHA-384, in DER."""
        return self._identity.sign(data, ec.ECDSA(hashes.SHA384()))


def verify(public_key: bytes, data: bytes, signature: bytes) -> bool:
    """Whether the holder of a P-384 key (its public half in PEM) signed `data`. What is no key verifies nothing."""
    try:
        key = serialization.load_pem_public_key(public_key)
        if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
            return False
        key.verify(signature, data, ec.ECDSA(hashes.SHA384()))
    except (InvalidSignature, ValueError):
        return False
    return True


def _new_identity() -> bytes:
    return ec.generate_private_key(ec.SECP384R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _private_key(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(_read(path), password=None)
    except (ValueError, TypeError):
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP384R1):
        raise SiteError(f"{path}: damaged, expected a P-384 private key in PEM; restore it from a backup")
    return key


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SiteError(f"{path}: cannot be read ({error.strerror})") from None
