"""What a site's folder keeps of frozen models' activations."""

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from clients.guard import activations
from tests.clients.sites import make_sites, run
from tests.conftest import sha256
from tests.fedmed.models.encoders import image_encoder, image_overrides
from tests.stores import hospital

pytestmark = pytest.mark.usefixtures("no_report")

POLICY: dict[str, Any] = {"tasks": ["spots"], "max_records_per_patient": 3, "data": "*"}


@pytest.fixture
def asked(tmp_path: Path) -> list[str]:
    """A run of a pretrained encoder's last block on two sites that have folders and policies."""
    for seed, site in enumerate("ab"):
        hospital(tmp_path / "data" / site, patients=60, name=site, seed=seed)
    folder = image_encoder(tmp_path / "encoder", "vit")
    return image_overrides(
        folder, "vit", tmp_path / "data", "adapter.last_blocks=1", f"federation.sites={tmp_path / 'sites'}",
        "task.declared_sizes={a: 60, b: 60}", "privacy.noise_multiplier=8", "rounds=1", "training.steps_per_round=1",
    )  # fmt: skip


def sites(folder: Path, **policy: Any) -> Path:
    weights = folder / "encoder" / "model.safetensors"
    models = [{"id": "encoder", "sha256": sha256(weights)}] if weights.exists() else []
    return make_sites(folder / "sites", "a", "b", models=models, **POLICY, **policy)


def entries(folder: Path) -> dict[str, tuple[str, ...]]:
    return {path.name: tuple(p.name for p in (path / "activations").glob("*")) for path in folder.iterdir()}


def test_they_lie_in_the_site_s_folder_and_later_runs_find_them(tmp_path: Path, asked: list[str]) -> None:
    folder = sites(tmp_path)
    run([*asked, f"run_dir={tmp_path / 'one'}"])
    found = entries(folder)
    assert {site: len(names) for site, names in found.items()} == {"a": 1, "b": 1}
    assert found["a"] != found["b"]
    for path in folder.glob("*/activations/*"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert not list(Path(os.environ["FEDMED_HOME"]).rglob("*.activations"))
    written = {path: path.stat().st_ino for path in folder.glob("*/activations/*")}
    run([*asked, "seed=1", f"run_dir={tmp_path / 'two'}"])
    assert {path: path.stat().st_ino for path in folder.glob("*/activations/*")} == written


def test_who_leaves_the_data_leaves_the_activations(tmp_path: Path, asked: list[str]) -> None:
    folder = sites(tmp_path)
    run([*asked, f"run_dir={tmp_path / 'one'}"])
    before = entries(folder)
    hospital(tmp_path / "data" / "a", patients=59, name="a", seed=0)
    run([*asked, f"run_dir={tmp_path / 'two'}"])
    after = entries(folder)
    assert after["b"] == before["b"]
    assert len(after["a"]) == 1
    assert not set(after["a"]) & set(before["a"])


def test_a_site_may_keep_nothing(tmp_path: Path, asked: list[str]) -> None:
    folder = sites(tmp_path, activations_gb=0)
    run([*asked, f"run_dir={tmp_path / 'one'}"])
    assert entries(folder) == {"a": (), "b": ()}


def test_a_person_sees_them_and_removes_them(tmp_path: Path, asked: list[str], command: Any) -> None:
    folder = sites(tmp_path) / "a"
    assert command("site", "cache", folder)[1] == "0 files of 0.00 GB; at most 20 GB are kept\n"
    run([*asked, f"run_dir={tmp_path / 'one'}"])
    said = json.loads(command("site", "cache", folder, "--json")[1])
    assert (said["entries"], said["most_bytes"]) == (1, 20 * 10**9)
    assert said["bytes"] == sum(path.stat().st_size for path in (folder / "activations").iterdir())
    assert command("site", "cache", folder, "--clear")[1].startswith("1 file of 0.00 GB removed")
    assert list((folder / "activations").iterdir()) == []
    code, out, err = command("site", "cache", tmp_path / "nowhere")
    assert (code, out) == (2, "")
    assert "no site there" in err


def test_their_place_is_the_folder_that_was_opened(tmp_path: Path) -> None:
    from clients.folder import SiteFolder

    folder = sites(tmp_path) / "a"
    assert activations(SiteFolder.open(folder)).folder == folder / "activations"
