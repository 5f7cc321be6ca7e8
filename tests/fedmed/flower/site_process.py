"""A site in a process of its own, whose memory can be measured: answers a number of requests with as many bytes.

Arguments: address, CA's file, key's file, node's file, requests. Stays until its input ends; prints the peak of its
memory in bytes, before and after.
"""

import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Array, ArrayRecord, Message, RecordDict

from fedmed.flower.site_link import SiteLink
from fedmed.resources import peak_resident


def main() -> None:
    address, ca, key_file, node, requests = sys.argv[1:]
    key = serialization.load_pem_private_key(Path(key_file).read_bytes(), password=None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    link = SiteLink(address, key=key, ca=Path(ca).read_bytes(), node_file=Path(node))
    link.connect()
    before = peak_resident()
    print("connected", flush=True)
    for _ in range(int(requests)):
        request = None
        while request is None:
            request = link.receive(20)
        arrays = {name: array.numpy() for name, array in request.message.content["arrays"].items()}  # type: ignore[union-attr]
        request.message.content = RecordDict()
        for name in arrays:
            np.negative(arrays[name], out=arrays[name])
        answer = ArrayRecord(OrderedDict((name, Array(arrays.pop(name))) for name in list(arrays)))
        reply = Message(RecordDict({"arrays": answer}), reply_to=request.message)
        del answer
        link.reply(request, reply)
        del reply
    # Flower takes no reply of a site that has left.
    sys.stdin.read()
    link.close()
    print(before, peak_resident(), flush=True)


if __name__ == "__main__":
    main()
