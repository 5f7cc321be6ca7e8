"""The SuperLink process: Flower's own app, behind the gate, with its state in a file.

Run it as a process of its own: `command` gives its command line.
"""

import argparse
import contextlib
import ctypes
import logging
import os
import sys
import threading
import time
from pathlib import Path

import uvicorn
from flwr.common.constant import ISOLATION_MODE_PROCESS, TRANSPORT_TYPE_GRPC_RERE
from flwr.supercore import sql_mixin
from flwr.supercore.constant import SQLITE_PRAGMAS, NodeStatus
from flwr.supercore.http_logging import get_uvicorn_log_config
from flwr.superlink.cli.flower_superlink import SuperLinkLifespan
from flwr.superlink.config_loader import SuperLinkLifespanConfig, load_control_authn_plugin
from flwr.superlink.main import create_app

from fedmed.flower.gate import Gate, Reason

log = logging.getLogger("fedmed.superlink")

# How often the certificate's file is looked at, in seconds.
LOOK = 2.0


def command(
    *,
    host: str,
    port: int,
    database: Path,
    control_secret: Path,
    executor_secret: Path,
    certificate: Path | None,
    key: Path | None,
    ca: Path | None,
) -> list[str]:
    """The command line of a SuperLink.

    Args:
        database: a file, made where there is none.
        control_secret: a file; its bytes, in hex, are what operators must know.
        executor_secret: a file; who knows it may run ServerApps.
        certificate: with `key` and `ca`, in PEM; all None: not encrypted, for tests on loopback.
    """
    options = {
        "host": host, "port": port, "database": database, "control-secret": control_secret,
        "executor-secret": executor_secret, "certificate": certificate, "key": key, "ca": ca,
    }  # fmt: skip
    given = [f"--{name}={value}" for name, value in options.items() if value is not None]
    return [sys.executable, "-m", "fedmed.flower.superlink", *given]


def main() -> None:
    """Serve until a signal ends it."""
    parser = argparse.ArgumentParser()
    for name in ("host", "database", "control-secret", "executor-secret"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--port", type=int, required=True)
    for name in ("certificate", "key", "ca"):
        parser.add_argument(f"--{name}")
    _serve(parser.parse_args())


def _spare_memory() -> None:
    """Keep this process small beside large updates, which pass through it in pieces.

    Flower gives each of its database connections 64 MB of pages and a 256 MB map of the file, and glibc each thread
    memory of its own, which it rarely gives back.
    """
    small = {"cache_size": "-4000", "mmap_size": "0"}
    sql_mixin.SQLITE_PRAGMAS = tuple((name, small.get(name, value)) for name, value in SQLITE_PRAGMAS)
    # M_ARENA_MAX of mallopt(3); other C libraries have no such setting.
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).mallopt(-8, 2)


def _serve(args: argparse.Namespace) -> None:
    _spare_memory()
    certificates = None
    if args.certificate:
        certificates = tuple(Path(name).read_bytes() for name in (args.ca, args.certificate, args.key))
    # The database holds what sites sent, for their coordinator alone.
    os.umask(0o077)
    app = create_app(
        SuperLinkLifespanConfig(
            control_address="",
            health_server_address=None,
            host=args.host,
            port=args.port,
            insecure=certificates is None,
            certificates=certificates,
            superexec_auth_secret=Path(args.executor_secret).read_bytes(),
            authn_plugin=load_control_authn_plugin(),
            event_log_plugin=None,
            fleet_event_log_plugin=None,
            enable_event_log=False,
            artifact_provider=None,
            enable_supernode_auth=True,
            fleet_api_type=TRANSPORT_TYPE_GRPC_RERE,
            fleet_api_address=None,
            simulation=False,
            ssl_ca_certfile=args.ca,
            ssl_certfile=args.certificate,
            ssl_keyfile=args.key,
            database=args.database,
            isolation=ISOLATION_MODE_PROCESS,
            runtime_dependency_install=False,
        ),
        SuperLinkLifespan,
    )
    state = app.state.linkstate_factory.state()

    def standing(key: bytes) -> Reason | None:
        if state.get_node_id_by_public_key(key) is not None:
            return None
        gone = state.get_node_info(statuses=[NodeStatus.UNREGISTERED])
        return Reason.EXPELLED if any(node.public_key == key for node in gone) else Reason.UNKNOWN

    secret = Path(args.control_secret).read_bytes().hex().encode()
    config = uvicorn.Config(
        Gate(app, secret=secret, standing=standing),
        host=args.host,
        port=args.port,
        log_config=get_uvicorn_log_config(logging.INFO),
        access_log=False,
        # A site that says something every few seconds keeps its connection.
        timeout_keep_alive=60,
        ssl_keyfile=args.key,
        ssl_certfile=args.certificate,
    )
    if certificates is not None:
        config.load()
        threading.Thread(target=_renew, args=(config, args.certificate, args.key), daemon=True).start()
    uvicorn.Server(config).run()


def _renew(config: uvicorn.Config, certificate: str, key: str) -> None:
    """Take up a new certificate without dropping a connection: handshakes from then on use it."""
    seen = Path(certificate).stat().st_mtime_ns
    while True:
        time.sleep(LOOK)
        try:
            now = Path(certificate).stat().st_mtime_ns
            if now != seen:
                assert config.ssl is not None
                config.ssl.load_cert_chain(certificate, key)
                seen = now
                log.warning("a new certificate is in use")
        except OSError as error:
            log.error("the new certificate cannot be used (%s); the one before stays", type(error).__name__)


if __name__ == "__main__":
    main()
