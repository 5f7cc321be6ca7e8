"""A SuperLink on loopback, with sites' keys and certificates made for it."""

import datetime
import ipaddress
import os
import secrets
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fedmed.flower.control import Control
from fedmed.flower.line import LinkDown
from fedmed.flower.server import NetworkGrid
from fedmed.flower.site_link import SiteLink
from fedmed.flower.superlink import command
from fedmed.flower.tasks import Task, Tasks


def new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP384R1())


def pem_of(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def write_certificates(folder: Path, *, days: int = 1) -> None:
    """`server.pem` and `server.key` for 127.0.0.1, and the CA where there is none; with negative days, expired."""
    now = datetime.datetime.now(datetime.UTC)
    if not (folder / "ca.key").exists():
        write_key(folder / "ca.key", new_key())
    ca_key = serialization.load_pem_private_key((folder / "ca.key").read_bytes(), password=None)
    assert isinstance(ca_key, ec.EllipticCurvePrivateKey)
    server_key = new_key()
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"CA of {folder.name}"[:60])])

    def built(
        name: x509.Name, key: ec.EllipticCurvePrivateKey, *, authority: bool, days: int
    ) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(issuer)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=30))
            .not_valid_after(now + datetime.timedelta(days=days))
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        )

    if not (folder / "ca.pem").exists():
        authority = built(issuer, ca_key, authority=True, days=30).sign(ca_key, hashes.SHA384())
        (folder / "ca.pem").write_bytes(authority.public_bytes(serialization.Encoding.PEM))
    host = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    server = built(name, server_key, authority=False, days=days).add_extension(host, critical=False)
    write_key(folder / "server.key", server_key)
    # Last: the SuperLink looks at this one for changes.
    signed = server.sign(ca_key, hashes.SHA384())
    (folder / "server.pem").write_bytes(signed.public_bytes(serialization.Encoding.PEM))


def write_key(path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Network:
    """A SuperLink that can be killed and started again, and what talks to it."""

    folder: Path
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None
    links: list[SiteLink] = field(default_factory=list)

    def __post_init__(self) -> None:
        write_certificates(self.folder)
        for name in ("control", "executor"):
            (self.folder / name).write_bytes(secrets.token_bytes(32))

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def ca(self) -> bytes:
        return (self.folder / "ca.pem").read_bytes()

    @property
    def secret(self) -> bytes:
        return (self.folder / "control").read_bytes()

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    def served(self) -> str:
        """The certificate that a new connection meets, in PEM."""
        return ssl.get_server_certificate(("127.0.0.1", self.port))

    def start(self) -> None:
        line = command(
            host="127.0.0.1", port=self.port, database=self.folder / "superlink.db",
            control_secret=self.folder / "control", executor_secret=self.folder / "executor",
            certificate=self.folder / "server.pem", key=self.folder / "server.key", ca=self.folder / "ca.pem",
        )  # fmt: skip
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(line, stdout=log, stderr=log, env=os.environ)
        end = time.monotonic() + 60
        while True:
            try:
                control = self.control()
                control.nodes()
                control.close()
                return
            except LinkDown:
                assert time.monotonic() < end, self.log
                assert self.process.poll() is None, self.log
                time.sleep(0.1)

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def end(self) -> None:
        for link in self.links:
            link.close()
        if self.process is not None and self.process.poll() is None:
            self.kill()

    def control(self) -> Control:
        return Control(self.address, ca=self.ca, secret=self.secret)

    def link(self, name: str, key: ec.EllipticCurvePrivateKey) -> SiteLink:
        made = SiteLink(self.address, key=key, ca=self.ca, node_file=self.folder / f"{name}.node")
        self.links.append(made)
        return made

    def site(self, name: str) -> SiteLink:
        """An admitted site, connected."""
        key = new_key()
        control = self.control()
        control.register(name, pem_of(key))
        control.close()
        made = self.link(name, key)
        made.connect()
        return made

    def task(self, *overrides: str) -> Task:
        """A run that was launched and taken on."""
        control = self.control()
        control.start_run(overrides)
        control.close()
        tasks = Tasks(
            self.address,
            ca=self.ca,
            secret=self.secret,
            executor_secret=(self.folder / "executor").read_bytes(),
        )
        task = tasks.acquire()
        assert task is not None
        tasks.close()
        return task

    def grid(self, task: Task) -> NetworkGrid:
        return NetworkGrid(self.address, ca=self.ca, secret=self.secret, token=task.token, run=task.run)


@contextmanager
def beating(task: Task) -> Iterator[None]:
    """Says that a run goes on, as its process does: Flower gives up one that is silent for a minute."""
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(10):
            task.heartbeat()

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
