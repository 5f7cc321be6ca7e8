"""A process that plays sites: `python -m tests.strategies.coordinator.play_sites HUB NAME…`.

Their keys are `NAME.key` beside the coordinator's folder HUB. Each answers until it is killed, through deaths of the
coordinator.
"""

import sys
import threading
import time
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Context, MessageType, RecordDict

from clients.client_app import app
from fedmed.flower.line import LinkError
from fedmed.flower.site_link import SiteLink
from strategies.coordinator.folder import CoordinatorFolder

ONE = threading.Lock()


def new_site(folder: Path, name: str) -> Path:
    """Make a site's key; the file that a coordinator admits."""
    key = ec.generate_private_key(ec.SECP384R1())
    (folder / f"{name}.key").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    public = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    path = folder / f"{name}.pub"
    path.write_bytes(f"# fedmed site: {name}\n".encode() + public)
    return path


def play(folder: CoordinatorFolder, name: str, number: int, ca: bytes | None) -> None:
    """Be one site."""
    key = serialization.load_pem_private_key((folder.path.parent / f"{name}.key").read_bytes(), password=None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    node_file = folder.path.parent / f"{name}.node"
    context = Context(1, number, {"partition-id": number}, RecordDict(), {})
    link = None
    while True:
        try:
            if link is None:
                link = SiteLink(folder.address, key=key, ca=ca, node_file=node_file)
                link.connect()
            request = link.receive(5.0)
            if request is not None:
                # They share one model, as no two real sites do.
                with ONE:
                    reply = app(message=request.message, context=context)
                    if request.message.metadata.message_type == MessageType.TRAIN:
                        # So that a run of some rounds can be met half-way.
                        time.sleep(0.3)
                link.reply(request, reply)
        except LinkError as error:
            print(name, error, flush=True)
            link = None
            time.sleep(0.3)


def main() -> None:
    """Play every site that was named."""
    folder = CoordinatorFolder.open(Path(sys.argv[1]))
    # As it was handed to the sites.
    ca = (folder.path.parent / "given.pem").read_bytes()
    for number, name in enumerate(sys.argv[2:]):
        threading.Thread(target=play, args=(folder, name, number, ca or None), daemon=True).start()
    while True:
        time.sleep(60)


if __name__ == "__main__":
    main()
