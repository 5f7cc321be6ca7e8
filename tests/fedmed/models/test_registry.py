"""Every model by name says what people should know, and a run names the commit and digest that were pulled."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

import configs.model
from fedmed.compose import compose
from fedmed.config import OPTIONS, RunConfig
from fedmed.errors import ConfigError, ModelError
from fedmed.models.build import build
from fedmed.models.pins import FILES, find, models_folder
from fedmed.models.registry import entries, entry
from fedmed.pretrained import ModelAbout, PretrainedConfig
from tests.fedmed.models.encoders import image_encoder
from tests.fedmed.models.test_archive import placed

FOLDER = Path(next(iter(configs.model.__path__)))
# Of these no file with weights was ever fetched; a digest or commit in their file would be made up.
UNPINNED = {
    "clinicalbert",
    "derm_monet",
    "hear",
    "medsiglip",
    "phikon",
    "phikon_v2",
    "pubmedclip",
    "rad_dino",
    "uni",
}
# These lie in a Python package, one that is installed beside fedmed, and its own; or are made of both kinds.
PINNED = {"minilm", "phantom", "lite_phantom"}
IMAGES = ["task=dicom", "task.path=ingested"]


def test_every_pretrained_model_with_a_place_has_an_entry() -> None:
    options = {path.stem: yaml.safe_load(path.read_text()) for path in FOLDER.glob("*.yaml")}
    placed_somewhere = {
        name for name, values in options.items() if values.keys() & {"hub", "package", "about"}
    }
    assert placed_somewhere == set(entries()) == UNPINNED | PINNED


@pytest.mark.parametrize("name", sorted(UNPINNED | PINNED))
def test_an_entry_says_what_people_should_know(name: str) -> None:
    found = entries()[name]
    said = dataclasses.asdict(found.about)
    assert said.keys() == {field.name for field in dataclasses.fields(ModelAbout)}
    assert all(said[key] for key in said if key != "gated"), "nothing is left unsaid"
    pages = ("https://huggingface.co/", "https://pypi.org/project/")
    assert found.about.source.startswith(pages) or Path(found.about.source).is_file()
    assert issubclass(OPTIONS["model"][found.settings["kind"]], PretrainedConfig)
    if name in UNPINNED:
        assert not found.sha256
        assert not found.settings.get("revision")
        assert found.about.tested.startswith("Nothing")
        assert found.settings["lora_targets"]
        # A table of the terminal is not wide.
        assert len(found.about.modality) <= 32
        assert len(found.about.licence) <= 32


def test_a_model_is_found_by_its_name_its_hub_id_or_any_hub_id() -> None:
    assert entry("rad_dino") == entry("microsoft/rad-dino")
    assert entry("facebook/dinov2-small").hub == "facebook/dinov2-small"
    for wrong, hint in (
        ("rad-dino", "did you mean 'rad_dino'"),
        ("../x", "no such model"),
        ("a/b/c", "no such model"),
    ):
        with pytest.raises(ConfigError, match=hint):
            entry(wrong)


def test_a_pulled_model_without_a_name_is_listed_by_its_hub_id() -> None:
    pin = placed(hub="org/model")
    found = entries()["org/model"]
    assert (found.pin, found.folder, found.differences()) == (pin, pin.folder, [])


def test_an_unpinned_model_is_refused_with_what_to_do() -> None:
    for name, more in (("rad_dino", IMAGES), ("clinicalbert", [])):
        hub = entries()[name].hub
        with pytest.raises(
            ConfigError, match=rf"^model\.hub={hub}: .*run: fedmed models pull {name};"
        ) as caught:
            compose([f"model={name}", *more])
        assert "model.revision=COMMIT model.sha256=DIGEST" in str(caught.value)
    with pytest.raises(ConfigError, match=r"convert it .*, then: fedmed models import FOLDER --name uni;"):
        compose(["model=uni", *IMAGES])


def test_a_run_names_the_commit_and_digest_that_were_pulled() -> None:
    pin = placed(hub="microsoft/rad-dino")
    config = compose(["model=rad_dino", *IMAGES])
    assert (config.model.hub, config.model.revision, config.model.sha256) == (
        pin.hub,
        pin.revision,
        pin.sha256,
    )
    # Any model of the hub, named or not, and not one that names its digest itself.
    placed(hub="org/other")
    assert compose(["model=hf_image", "model.hub=org/other", *IMAGES]).model.sha256 == pin.sha256
    own = [f"model.revision={'d' * 40}", f"model.sha256={'0' * 64}"]
    assert compose(["model=rad_dino", *own, *IMAGES]).model.sha256 == "0" * 64


def test_a_commit_that_was_not_pulled_is_refused() -> None:
    placed(hub="microsoft/rad-dino")
    with pytest.raises(
        ConfigError, match=rf"microsoft/rad-dino is here at {'a' * 40}; .*--revision {'d' * 40}"
    ):
        compose(["model=rad_dino", f"model.revision={'d' * 40}", *IMAGES])


def test_a_converted_model_comes_from_a_folder() -> None:
    away = ["model.hub=null", "model.path=converted", f"model.sha256={'0' * 64}"]
    assert compose(["model=clinicalbert", *away]).model.name == "converted"
    pin = placed(hub="local/uni")
    assert compose(["model=uni", *IMAGES]).model.sha256 == pin.sha256


DAMAGED = {
    "{": "damaged; run: fedmed models pull microsoft/rad-dino --replace",
    "[]": "pin=…: expected a mapping",
    "{}": "missing",
    '{"hub": "org/other", "revision": "%s", "transformers": "", "files": {}}'
    % ("a" * 40): "files=…: expected",
}


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_pin_is_no_reason_to_run_with_anything_else(content: str) -> None:
    placed(hub="microsoft/rad-dino")
    (models_folder() / "microsoft--rad-dino.json").write_text(content)
    with pytest.raises(ModelError, match=rf"microsoft--rad-dino\.json: .*{re.escape(DAMAGED[content])}"):
        compose(["model=rad_dino", *IMAGES])


def test_a_pin_under_another_models_name_is_refused() -> None:
    placed(hub="org/other")
    (models_folder() / "org--other.json").rename(models_folder() / "microsoft--rad-dino.json")
    with pytest.raises(ModelError, match=r"is the pin of org/other, expected microsoft/rad-dino"):
        find("microsoft/rad-dino")


# What stands in for the weights of each named model: a tiny one of its architecture.
FAMILY = {
    "derm_monet": "clip", "medsiglip": "siglip", "phikon": "vit", "phikon_v2": "dinov2", "pubmedclip": "clip",
    "rad_dino": "dinov2", "uni": "dinov2",
}  # fmt: skip


def installed(folder: Path, hub: str) -> None:
    """The folder's files, as if they had been pulled."""
    placed({path.name: path.read_bytes() for path in folder.iterdir() if path.name in FILES}, hub=hub)


def adapted(config: RunConfig) -> list[str]:
    """The linear layers that have LoRA, by their last names."""
    model = build(config.task, config.model, config.adapter)
    return [name.partition(".lora_A")[0].rpartition(".")[2] for name in model.adapter() if "lora_A" in name]


@pytest.mark.parametrize("name", FAMILY)
def test_a_named_image_model_loads_and_lora_goes_where_its_entry_says(name: str, tmp_path: Path) -> None:
    installed(image_encoder(tmp_path / name, FAMILY[name]), entries()[name].hub)
    lora = ["adapter=lora", "adapter.last_blocks=2", "task.image_size=20"]
    assert sorted(adapted(compose([f"model={name}", *IMAGES, *lora]))) == ["q_proj"] * 2 + ["v_proj"] * 2


def test_clinicalbert_loads_and_lora_goes_where_its_entry_says(bert_folder: Path) -> None:
    installed(bert_folder, "emilyalsentzer/Bio_ClinicalBERT")
    config = compose(["model=clinicalbert", "model.max_tokens=32", "adapter=lora", "adapter.last_blocks=2"])
    assert sorted(adapted(config)) == ["query"] * 2 + ["value"] * 2


def test_hear_is_not_trained_on_images() -> None:
    with pytest.raises(
        ConfigError, match=r"^model\.kind=sound: expected a model that reads a task of kind 'image'"
    ):
        compose(["model=hear", *IMAGES, f"model.revision={'c' * 40}", f"model.sha256={'a' * 64}"])
