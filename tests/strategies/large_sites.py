"""Sites over a real network whose updates are large: `python -m tests.strategies.large_sites ADDRESS FOLDER NAME…`.

Each has its key and node in FOLDER, agrees to every run, and answers a round with numbers of its own.
"""

import sys
import threading
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Message, MessageType

from fedmed.flower.site_link import Request, SiteLink
from fedmed.records import Quote, Receipt, quote_record, read_instruction, update_record

ONE = threading.Lock()


def answer(request: Request, name: str, number: int) -> Message:
    """A quote, or an update of the shapes that were sent."""
    message = request.message
    instruction, arrays = read_instruction(message.content)
    size = instruction.task.declared_train(name)
    if message.metadata.message_type != MessageType.TRAIN:
        content = quote_record(Quote(site=name, declared_size=size, epsilon=None))
        return Message(content, reply_to=message)
    rng = np.random.default_rng(number)
    delta = {key: rng.standard_normal(values.shape, np.float32) for key, values in arrays.items()}
    receipt = Receipt(site=name, round=instruction.round, declared_size=size, noise_draws=0)
    return Message(update_record(receipt, delta), reply_to=message)


def play(address: str, folder: Path, name: str, number: int) -> None:
    """Be one site, until the process ends."""
    key = serialization.load_pem_private_key((folder / f"{name}.key").read_bytes(), password=None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    link = SiteLink(address, key=key, ca=(folder / "ca.pem").read_bytes(), node_file=folder / f"{name}.node")
    link.connect()
    # In one piece: others print too.
    sys.stdout.write(f"{name}\n")
    sys.stdout.flush()
    while True:
        request = link.receive(20)
        if request is not None:
            # One at a time: it is not their memory that is measured.
            with ONE:
                link.reply(request, answer(request, name, number))


def main() -> None:
    """Play all that were named, until the input ends."""
    address, folder, *names = sys.argv[1:]
    for number, name in enumerate(names):
        threading.Thread(target=play, args=(address, Path(folder), name, number), daemon=True).start()
    sys.stdin.read()


if __name__ == "__main__":
    main()
