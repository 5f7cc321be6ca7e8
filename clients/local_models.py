"""The models that a site lists, where they are on this machine."""

import importlib.util
import json
from pathlib import Path
from typing import Any

from fedmed.errors import ModelError
from fedmed.models.loading import IMAGE_FAMILIES
from fedmed.models.pins import WEIGHTS, find, is_hub_id, sha256_of


def model_folder(name: str) -> tuple[Path | None, dict[str, Any]]:
    """The folder of a listed model, and the keys that name it in a model's configuration; None where it is not here.

    What is listed by the name of its folder alone could be anywhere.
    """
    if ":" in name:
        package, _, inner = name.partition(":")
        # A name with a dot would import its parent.
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
        places = spec.submodule_search_locations if spec else None
        return (Path(places[0]) / inner if places else None), {"package": name}
    pin = find(name) if is_hub_id(name) and "/" in name else None
    if pin is None:
        return None, {}
    return pin.folder, {"hub": name, "revision": pin.revision}


def reads_images(folder: Path) -> bool:
    """Whether the encoder in a folder is one for images.

    Raises:
        ModelError: its config.json is missing or damaged.
    """
    try:
        return json.loads((folder / "config.json").read_text()).get("model_type") in IMAGE_FAMILIES
    except (OSError, ValueError, AttributeError):
        raise ModelError(f"{folder}: its config.json is missing or damaged") from None


def differs(name: str, sha256: str) -> str | None:
    """What is wrong with a listed model and what to do about it; None where its weights are the listed ones.

    Raises:
        ModelError: its pin is damaged.
    """
    folder, _ = model_folder(name)
    if folder is None:
        if "/" in name:
            return f"not here; run: fedmed models pull {name}"
        return "its package is not installed" if ":" in name else None
    try:
        found = sha256_of(folder / WEIGHTS)
    except OSError as error:
        raise ModelError(f"{folder / WEIGHTS}: cannot be read ({error.strerror})") from None
    return None if found == sha256 else f"{folder / WEIGHTS} has sha256 {found}, and not the listed one"


def is_elsewhere(name: str) -> bool:
    """Whether a model is listed by the name of a folder that only a run's settings point to."""
    return ":" not in name and "/" not in name
