"""As test_nothing_leaks.py, for ingested images: canaries in labels, manufacturers, folder names and patient ids."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import clients.site
import fedmed.data.images
import fedmed.dicom.store
import fedmed.models.cnn
import strategies.run
from clients.folder import KEY
from fedmed.cli.main import main
from fedmed.data.readers import check_site
from fedmed.dicom.store import ImageStore
from tests.clients.planted import HASH, MARK, PlantedImages, all_bytes, ingested, leaks
from tests.clients.sites import GENEROUS, account, change_policy, instruction, make_site, make_sites, start
from tests.clients.test_nothing_leaks import FAILED, KINDS, SAID, Seen, Stage, check
from tests.clients.test_nothing_leaks import seen as seen


@pytest.fixture
def planted(tmp_path: Path) -> PlantedImages:
    return ingested(tmp_path)


@pytest.fixture
def stage(planted: PlantedImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    site = make_site(tmp_path / "sites" / "a", "a", held_out="private", budget=80).path
    planted.more |= {(site / KEY).read_bytes().hex()}
    asked = instruction(planted.settings, run_id=f"run of {tmp_path.name}")
    return Stage(planted, site, monkeypatch, asked, start(asked))  # type: ignore[arg-type]


def test_a_site_that_works_sends_an_update_and_a_histogram_and_no_canary(stage: Stage, seen: Seen) -> None:
    """The ledger enrols the pseudonyms; they are in the store, and nowhere outside."""
    stage.quote()
    stage.rounds()
    assert (stage.errors, stage.refusal) == ([], None)
    assert len(stage.left()) > 100_000
    check(stage, seen)
    assert leaks(all_bytes(stage.site.parent.parent), stage.planted.canaries)


def text(name: str, change: Callable[[str], str]) -> Callable[[PlantedImages], object]:
    def write(planted: PlantedImages) -> None:
        path = planted.path / "a" / name
        before = path.read_text()
        after = change(before)
        assert after != before
        path.write_text(after)
        planted.remember()

    return write


def truncated(planted: PlantedImages) -> None:
    os.truncate(planted.path / "a" / "pixels.npy", 1000)
    planted.remember()


BAD: dict[str, Callable[[PlantedImages], object]] = {
    "ingestion not finished": lambda p: (p.path / "a" / "manifest.json").unlink(),
    "folder gone": lambda p: (p.path / "a").rename(p.path / "b"),
    "manifest damaged": text("manifest.json", lambda _: f'{{"{SAID}": '),
    "manifest of another format": text("manifest.json", lambda t: json.dumps(json.loads(t) | {"format": SAID})),
    "pixels truncated": truncated,
    "pixels gone": lambda p: (p.path / "a" / "pixels.npy").unlink(),
    "records gone": lambda p: (p.path / "a" / "records.csv").unlink(),
    "a record with a surplus cell": text("records.csv", lambda t: t + f"9,{SAID},,,,,,,,,,,,,,,\n"),
    "a patient by name": text("records.csv", lambda t: t.replace(t.split("\n")[3].split(",")[1], f"{MARK} Ada")),
    "text for a number": text("records.csv", lambda t: t.replace(",DX,1,", f",DX,{MARK},")),
}  # fmt: skip

# Images of which none, or too few for a part, can be used: a failure would tell that nobody is there.
NOBODY: dict[str, Callable[[PlantedImages], object]] = {
    "every label undeclared": lambda p: p.put(label=f"{MARK} positive"),
    "every label blank": lambda p: p.put(label=""),
    "every modality another": lambda p: p.put(modality=f"{MARK}"),
    "one patient": lambda p: (p.images.__delitem__(slice(1, None)), p.put(label="clear")),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_images_that_cannot_be_used_are_one_constant(
    name: str, stage: Stage, planted: PlantedImages, seen: Seen
) -> None:
    stage.quote()
    BAD[name](planted)
    stage.rounds()
    assert stage.refusal is None
    assert stage.errors == [FAILED] * 3
    check(stage, seen)


@pytest.mark.parametrize("name", NOBODY)
def test_whether_anybody_is_left_in_the_images_is_not_told(
    name: str, stage: Stage, planted: PlantedImages, seen: Seen
) -> None:
    stage.quote()
    NOBODY[name](planted)
    stage.rounds()
    assert (stage.errors, stage.refusal) == ([], None)
    check(stage, seen)


ODD: dict[str, Callable[[PlantedImages], object]] = {
    "some labels undeclared": lambda p: p.put(only=7, label=f"{MARK} perhaps"),
    "some labels blank": lambda p: p.put(only=7, label=""),
    "some modalities others": lambda p: p.put(only=7, modality=f"{MARK} PT"),
    "a huge manufacturer": lambda p: p.put(only=2, manufacturer=SAID * 1000, label=f'"{SAID}"\n,'),
}


@pytest.mark.parametrize("name", ODD)
def test_what_is_left_out_of_the_images_is_not_told(
    name: str, stage: Stage, planted: PlantedImages, seen: Seen
) -> None:
    plain = check_site(stage.asked.task, "a", seed=0)
    stage.quote()
    ODD[name](planted)
    odd = check_site(stage.asked.task, "a", seed=0)
    assert odd != plain
    assert MARK not in repr(odd)
    stage.rounds()
    assert (stage.errors, stage.refusal) == ([], None)
    check(stage, seen)


PLACES: list[tuple[Any, str]] = [
    *((fedmed.data.images, name) for name in (
        "version_of", "read_site", "locate", "_facts", "_usable", "prepared", "squared", "held_out", "blank_cells")),
    *((fedmed.dicom.store, name) for name in ("read_manifest", "_read_records", "_contiguous")),
    (ImageStore, "open"), (ImageStore, "image"),
    (fedmed.models.cnn.CnnClassifier, "prepare"), (fedmed.models.cnn.CnnClassifier, "forward"),
]  # fmt: skip


@pytest.mark.parametrize(("where", "name"), PLACES, ids=lambda x: x if isinstance(x, str) else x.__name__)
def test_whatever_raises_with_a_value_in_its_words_is_one_constant(
    where: Any, name: str, stage: Stage, seen: Seen
) -> None:
    stage.quote()
    number, reached = PLACES.index((where, name)), []

    def fail(*_: object, **__: object) -> None:
        reached.append(name)
        raise KINDS[(number + len(reached)) % len(KINDS)]()

    with stage.patch.context() as patch:
        patch.setattr(where, name, fail)
        stage.rounds()
    assert reached
    assert FAILED in stage.errors
    check(stage, seen)


def test_the_coordinator_sees_no_canary(
    planted: PlantedImages, tmp_path: Path, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole run: site b has no data, so that its rounds fail."""
    sites = make_sites(tmp_path / "sites", held_out="private", budget=80)
    planted.more |= {(sites / site / KEY).read_bytes().hex() for site in ("a", "b")}
    settings = [
        text.replace(str(planted.path), str(tmp_path / "runs-read-their-own")) for text in planted.settings
    ]
    # Each site reads the folder that its own site.yaml names.
    change_policy(
        sites / "a", **{**GENEROUS, "metrics": {"held_out": "private"}, "data": str(planted.path / "a")}
    )
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(strategies.run, "write_report", lambda *_: None)
        patch.chdir(tmp_path)
        patch.setattr(sys, "argv", [
            "fedmed", "run", *settings, f"federation.sites={sites}", f"run_dir={folder}",
        ])  # fmt: skip
        with pytest.raises(SystemExit) as ended:
            main()
    said = seen.text()
    assert ended.value.code == 0, said
    outside = all_bytes(folder)
    assert b"epsilon" in outside
    assert HASH.encode() not in outside
    assert not leaks(outside, planted.canaries)
    assert not leaks(said, planted.canaries)
    assert account(sites / "a").cohort("default").charges


def test_the_site_s_own_folder_is_read_whatever_the_run_names(stage: Stage, planted: PlantedImages) -> None:
    """And the ledger enrols the patients whom ingestion named."""
    found = clients.site.pseudonyms(stage.asked, "a", bytes(32))
    assert {p.hex() for p in found} <= {image.patient for image in planted.images}
    assert len(found) > 30
