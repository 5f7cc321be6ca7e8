"""How a site finds and trusts its coordinator, and what it hands over to be admitted. No secret is in it."""

import ipaddress
import re
import shlex
from pathlib import Path

from fedmed.errors import ConfigError

# The coordinator's certificate authority, in a site's folder.
CA = "ca.pem"
INSECURE = "--insecure-for-testing"


def host_port(address: str) -> tuple[str, int]:
    """The two halves of HOST:PORT; an IPv6 address stands in brackets.

    Raises:
        ConfigError: it is none.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 1 <= int(port) <= 65_535:
        raise ConfigError(f"coordinator={address}: expected HOST:PORT, the port from 1 to 65535")
    return host.removeprefix("[").removesuffix("]"), int(port)


def is_loopback(address: str) -> bool:
    """Whether HOST:PORT never leaves this machine. A name other than localhost may point anywhere."""
    host, _ = host_port(address)
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def given(address: str | None, file: Path | None) -> bytes | None:
    """The certificate authority in a file that was named beside a coordinator; None for one on this machine.

    Raises:
        ConfigError: one of the two is missing or is none.
    """
    if address is None:
        if file is not None:
            raise ConfigError(f"--ca {file}: expected beside it --coordinator HOST:PORT")
        return None
    host_port(address)
    if file is None:
        if not is_loopback(address):
            raise ConfigError(
                f"--ca: missing beside --coordinator {address}; ask the coordinator for its ca.pem"
            )
        return None
    try:
        content = file.read_bytes()
    except OSError as error:
        raise ConfigError(f"--ca {file}: cannot be read ({error.strerror})") from None
    check_ca(content, f"--ca {file}")
    return content


def trusted(folder: Path, address: str | None, *, insecure: bool) -> tuple[str, bytes | None]:
    """Where the coordinator of a site is, and the certificate authority that it must show; None: no encryption.

    Raises:
        ConfigError: none is named, its certificate authority is missing, or unencrypted traffic would leave this
            machine.
    """
    if address is None:
        raise ConfigError(
            f"coordinator=null: expected HOST:PORT in {folder / 'site.yaml'}, and the coordinator's ca.pem beside it"
        )
    host_port(address)
    if insecure:
        if not is_loopback(address):
            raise ConfigError(
                f"coordinator={address}: expected a loopback address, e.g. 127.0.0.1:9092, with {INSECURE}"
            )
        return address, None
    try:
        ca = (folder / CA).read_bytes()
    except OSError:
        raise ConfigError(
            f"{folder / CA}: missing; ask the coordinator for its ca.pem, then: "
            f"cp ca.pem {shlex.quote(str(folder / CA))}"
        ) from None
    check_ca(ca, str(folder / CA))
    return address, ca


def check_ca(content: bytes, name: str = "--ca") -> None:
    """Return if these are certificates in PEM and nothing else.

    Raises:
        ConfigError: they are not, or a private key stands beside them.
    """
    from cryptography import x509

    if b"PRIVATE KEY" in content:
        raise ConfigError(
            f"{name}: holds a private key, which belongs to the coordinator alone; ask it for ca.pem"
        )
    try:
        x509.load_pem_x509_certificates(content)
    except ValueError:
        raise ConfigError(
            f"{name}: expected the coordinator's certificate authority in PEM, its ca.pem"
        ) from None


def admission_name(name: str) -> str:
    """The name of the file that the coordinator admits a site with: letters, digits, dots and dashes.

    >>> admission_name("St. Mary's / West")
    'St.-Mary-s-West.pub'
    """
    # 60 characters are at most 240 bytes: no file system refuses them.
    plain = re.sub(r"[^\w.]+", "-", name).strip("-.")[:60]
    return f"{plain or 'site'}.pub"


def admission(name: str, public_key: bytes) -> bytes:
    """What the coordinator admits a site with: its name, and the public half of its key in PEM."""
    return f"# fedmed site: {name}\n".encode() + public_key
