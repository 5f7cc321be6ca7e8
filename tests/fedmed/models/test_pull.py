"""What comes from a hub is whole, is what the hub and the pin say, and is no code; else nothing is kept."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fedmed.compose import compose
from fedmed.errors import ConfigError, ModelError
from fedmed.models.loading import load_image_encoder, locate
from fedmed.models.pins import find, models_folder
from fedmed.models.pull import pull
from tests.fedmed.models.encoders import image_encoder
from tests.hub import COMMIT, Hub, serving

# What a repository may hold beside the model, and what must stay there.
BESIDE = {
    "pytorch_model.bin": b"a pickle",
    "modeling_custom.py": b"import os",
    "README.md": b"# model",
    "adapter_config.json": b"{}",
    "onnx/model.onnx": b"onnx",
}


@pytest.fixture
def hub(bert_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with a tiny BERT, to which huggingface_hub is pointed."""
    with serving(bert_folder, extra=BESIDE) as served:
        monkeypatch.setenv("HF_ENDPOINT", served.url)
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        monkeypatch.setenv("HF_TOKEN", "hf_canary")
        yield served


def nothing_is_left() -> bool:
    return not models_folder().exists() or not list(models_folder().iterdir())


def test_a_model_is_fetched_at_the_commit_of_main_without_code_and_pickles(hub: Hub) -> None:
    pulled = pull("org/model")
    pin = pulled.pin
    assert pulled.fetched
    assert (pin.hub, pin.revision, pin.sha256) == ("org/model", COMMIT, hub.digest())
    kept = {path.name: path.read_bytes() for path in pin.folder.iterdir()}
    assert kept == {name: content for name, content in hub.files.items() if name not in BESIDE}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= kept.keys()
    assert pin.files.keys() == kept.keys()
    assert pin == find("org/model")
    assert not [line for line in hub.asked if any(name in line for name in BESIDE)]
    assert sorted(path.name for path in models_folder().iterdir()) == [
        ".lock",
        "org--model.json",
        pin.folder.name,
    ]
    assert "canary" not in (models_folder() / "org--model.json").read_text()
    assert hub.tokens == {"Bearer hf_canary"}


def test_a_second_pull_only_hashes_and_a_damaged_model_is_fetched_again(hub: Hub) -> None:
    pin = pull("org/model").pin
    hub.asked.clear()
    again = pull("org/model")
    assert (again.fetched, again.pin, hub.asked) == (False, pin, [])
    (pin.folder / "config.json").write_text("{}")
    (pin.folder / "added.json").write_text("{}")
    mended = pull("org/model")
    assert (mended.fetched, mended.pin) == (True, pin)
    assert (pin.folder / "config.json").read_bytes() == hub.files["config.json"]
    assert not (pin.folder / "added.json").exists()


def test_a_mended_model_must_be_what_was_pinned(hub: Hub) -> None:
    """The hub's commit stays, its files do not: a hub that was taken over."""
    pin = pull("org/model").pin
    (pin.folder / "model.safetensors").unlink()
    hub.files["model.safetensors"] = b"other weights"
    with pytest.raises(
        ModelError, match=r"^org/model: the hub has other files at c0ffee00c0ff than were pinned"
    ):
        pull("org/model")
    assert find("org/model") == pin
    assert not (pin.folder / "model.safetensors").exists()


def test_another_version_replaces_only_when_told_so(hub: Hub) -> None:
    before = pull("org/model").pin
    hub.commit = "d" * 40
    hub.files["config.json"] += b" "
    assert not pull("org/model").fetched
    with pytest.raises(
        ModelError, match=r"here already at c0ffee00c0ff, asked for dddddddddddd; .* --replace$"
    ):
        pull("org/model", revision="main")
    after = pull("org/model", revision="main", replace=True).pin
    assert (after.revision, find("org/model")) == ("d" * 40, after)
    assert after.folder.is_dir()
    assert not before.folder.exists()


def test_weights_other_than_asked_for_are_not_kept(hub: Hub) -> None:
    with pytest.raises(
        ModelError, match=rf"has sha256 {hub.digest()} at c0ffee00c0ff, expected {'0' * 64}; not kept"
    ):
        pull("org/model", sha256="0" * 64)
    assert nothing_is_left()
    assert pull("org/model", sha256=hub.digest()).fetched
    with pytest.raises(ModelError, match="expected 0000"):
        pull("org/model", sha256="0" * 64)


FAULTS = {
    "gated": r"gated; accept its terms at http://127.0.0.1:\d+/org/model with your account, then set HF_TOKEN",
    "missing": r"not on the hub, or private: see http://127.0.0.1:\d+/org/model",
    "broken": r"the hub at http://127.0.0.1:\d+ answers 503; try again later",
    "short": r"the download ended early; nothing was kept, try again",
    "changed": r"model.safetensors came with sha256 [0-9a-f]{12} and \d+ bytes, the hub says [0-9a-f]{12} and \d+;",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_goes_wrong_is_one_line_and_leaves_nothing(hub: Hub, fault: str) -> None:
    hub.fault = fault
    with pytest.raises(ModelError, match=f"^org/model: {FAULTS[fault]}") as caught:
        pull("org/model")
    assert "\n" not in str(caught.value)
    assert "canary" not in str(caught.value)
    assert nothing_is_left()


@pytest.mark.usefixtures("hub")
def test_a_pull_request_is_resolved_to_its_commit_and_other_revisions_are_refused() -> None:
    assert pull("org/model", revision="refs/pr/1").pin.revision == COMMIT
    with pytest.raises(
        ModelError, match=r"^org/model: no revision 'v2'; see http://127.*/org/model/commits/main$"
    ):
        pull("org/model", revision="v2", replace=True)


def test_a_model_without_safetensors_is_refused_with_what_to_do(hub: Hub) -> None:
    del hub.files["model.safetensors"]
    with pytest.raises(
        ModelError, match=r"no model.safetensors .*\(pytorch_model.bin may run code.*--revision refs/pr/N"
    ):
        pull("org/model")
    hub.files["model.safetensors.index.json"] = b"{}"
    with pytest.raises(ModelError, match="its weights are split into several files"):
        pull("org/model")
    hub.files["model.safetensors"] = b""
    del hub.files["config.json"]
    with pytest.raises(ModelError, match=r"no config.json at c0ffee00c0ff"):
        pull("org/model")
    assert nothing_is_left()


def test_no_hub_and_no_permission_to_ask_it(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ModelError, match=r"the hub at http://127.0.0.1:9 cannot be reached \(ConnectError\)"):
        pull("org/model")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub.asked.clear()
    with pytest.raises(
        ModelError, match=r"HF_HUB_OFFLINE is set, .* fedmed models export .* fedmed models import"
    ):
        pull("org/model")
    assert hub.asked == []


@pytest.mark.parametrize(
    "name", ["", "..", "../x", "a/b/c", "org/../x", "a--b/c", "org/", "/etc", "a-/b", "é/x", "a" * 97]
)
def test_what_is_no_hub_id_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="expected a name that fedmed models list shows, or ORG/NAME"):
        pull(name)


@pytest.mark.parametrize("commit", ["", "main", "../../x", "C" * 40])
def test_a_hub_that_names_no_commit_is_refused(hub: Hub, commit: str) -> None:
    hub.commit = commit
    with pytest.raises(ModelError, match=r"names no commit for it$"):
        pull("org/model")
    assert nothing_is_left()


@pytest.mark.parametrize("files", [{}, {"../../canary": b"x"}, {"model.safetensors/../../canary": b"x"}])
def test_a_hub_with_nothing_or_with_names_that_climb(
    hub: Hub, files: dict[str, bytes], tmp_path: Path
) -> None:
    hub.files = files
    with pytest.raises(ModelError, match=r"no model\.safetensors at c0ffee00c0ff"):
        pull("org/model")
    hub.files = files | {"model.safetensors": b"x", "config.json": b"{}"}
    assert pull("org/model").pin.files.keys() == {"model.safetensors", "config.json"}
    assert not list(tmp_path.rglob("*canary*"))


def test_a_full_disk_is_said_before_the_download(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedmed.models import pins

    usage = pins.shutil.disk_usage("/")._replace(free=10)
    monkeypatch.setattr(pins.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ModelError, match=r"GB needed, 0\.0 GB free$"):
        pull("org/model")
    assert not [line for line in hub.asked if "resolve" in line]


@pytest.mark.usefixtures("hub")
def test_the_pin_says_for_which_transformers_it_was_fetched() -> None:
    import transformers

    pull("org/model")
    assert (
        json.loads((models_folder() / "org--model.json").read_text())["transformers"]
        == transformers.__version__
    )


def test_a_pulled_image_encoder_is_loaded_from_the_models_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = image_encoder(tmp_path / "dinov2", "dinov2")
    with serving(folder) as served:
        monkeypatch.setenv("HF_ENDPOINT", served.url)
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        pin = pull("org/model").pin
    run = compose(["model=hf_image", "model.hub=org/model", "task=dicom", "task.path=nowhere"])
    encoder, _ = load_image_encoder(run.model)
    weights = load_file(folder / "model.safetensors")
    own = encoder.state_dict()
    assert weights
    assert all(torch.equal(own[name], tensor) for name, tensor in weights.items() if name in own)
    assert locate(run.model) == pin.folder
    # Another commit was not pulled, and nothing is downloaded.
    elsewhere = dataclasses.replace(run.model, revision="d" * 40)
    with pytest.raises(
        ModelError, match=r"^model\.hub=org/model: commit d+ was not pulled .* pull org/model --revision d+"
    ):
        locate(elsewhere)
    (pin.folder / "preprocessor_config.json").write_text("{}")
    with pytest.raises(
        ModelError, match=r"preprocessor_config\.json has 2 bytes, not \d+; run: fedmed models pull"
    ):
        locate(run.model)


@pytest.mark.parametrize("fault", ["nobody", *FAULTS])
def test_a_password_in_the_hub_s_address_is_not_said(
    hub: Hub, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = "127.0.0.1:9" if fault == "nobody" else hub.url.removeprefix("http://")
    monkeypatch.setenv("HF_ENDPOINT", f"http://ada:s3cr3t@pass@{place}/")
    hub.fault = fault
    with pytest.raises(ModelError) as caught:
        pull("org/model")
    assert "org/model" in str(caught.value)
    assert "s3cr3t" not in str(caught.value)
    assert "pass" not in str(caught.value)
