"""A model as one file: the same bytes each time, and whatever else stands in a file is not unpacked."""

import hashlib
import io
import json
import random
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fedmed.errors import ModelError
from fedmed.models.archive import export, import_
from fedmed.models.pins import Pin, PinnedFile, drafting, find, install, models_folder, sha256_of
from fedmed.schema import to_dict
from tests.conftest import count

FILES = {
    "config.json": b'{"model_type": "bert"}',
    "model.safetensors": bytes(range(256)) * 5,
    "vocab.txt": b"a\nb",
}


def placed(files: dict[str, bytes] = FILES, *, hub: str = "org/model", revision: str = "a" * 40) -> Pin:
    """A model in the models folder, as if it had been pulled."""
    with drafting(0) as draft:
        for name, content in files.items():
            (draft / name).write_bytes(content)
        pin = Pin(
            hub=hub, revision=revision, transformers="5.23.0",
            files={p.name: PinnedFile(sha256=sha256_of(p), size=p.stat().st_size) for p in draft.iterdir()},
        )  # fmt: skip
        install(draft, pin, replace=True)
    return pin


@pytest.fixture
def other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Goes to a machine without internet, which has no model yet."""
    return lambda: monkeypatch.setenv("FEDMED_HOME", str(tmp_path / "other"))


def held() -> list[str]:
    return sorted(path.name for path in models_folder().glob("*") if path.name != ".lock")


def test_a_model_goes_to_another_machine_as_it_is(tmp_path: Path, other: Callable[[], None]) -> None:
    pin, file = placed(), tmp_path / "model.tar"
    export(pin, file)
    with tarfile.open(file, "r:") as tar:
        assert tar.getnames() == ["pin.json", *sorted(FILES)]
        assert json.load(tar.extractfile("pin.json") or io.BytesIO())["pin"] == to_dict(pin)
    other()
    assert find("org/model") is None
    assert import_(file, sha256=pin.sha256) == pin == find("org/model")
    assert {path.name: path.read_bytes() for path in pin.folder.iterdir()} == FILES
    # And from there the same file, byte for byte.
    export(pin, tmp_path / "again.tar")
    assert (tmp_path / "again.tar").read_bytes() == file.read_bytes()


def test_a_file_is_replaced_only_when_told_so_and_an_altered_model_is_not_exported(tmp_path: Path) -> None:
    pin, file = placed(), tmp_path / "model.tar"
    file.write_bytes(b"mine")
    with pytest.raises(ModelError, match=r"model\.tar: exists already; replace it with --force$"):
        export(pin, file)
    (pin.folder / "vocab.txt").write_bytes(b"c\nd")
    with pytest.raises(ModelError, match=r"vocab\.txt was changed; run: fedmed models pull org/model$"):
        export(pin, file, force=True)
    assert file.read_bytes() == b"mine"
    assert [path.name for path in tmp_path.glob("*model.tar*")] == ["model.tar"]
    with pytest.raises(ModelError, match=r"no folder '.*nowhere'$"):
        export(pin, tmp_path / "nowhere" / "model.tar")


def test_another_version_is_replaced_only_when_told_so(tmp_path: Path) -> None:
    newer = placed(FILES | {"config.json": b"{}"}, revision="b" * 40)
    export(newer, tmp_path / "newer.tar")
    older = placed()
    with pytest.raises(
        ModelError, match=r"org/model: here already at aaaaaaaaaaaa .*not at bbbbbbbbbbbb.*--replace$"
    ):
        import_(tmp_path / "newer.tar")
    assert find("org/model") == older
    assert older.folder.is_dir()
    assert import_(tmp_path / "newer.tar", replace=True) == newer == find("org/model")
    assert held() == sorted([newer.folder.name, "org--model.json"])


def test_the_same_version_mends_what_is_damaged(tmp_path: Path) -> None:
    pin = placed()
    export(pin, tmp_path / "model.tar")
    (pin.folder / "vocab.txt").unlink()
    import_(tmp_path / "model.tar")
    assert (pin.folder / "vocab.txt").read_bytes() == FILES["vocab.txt"]


def test_weights_other_than_expected_are_not_taken(tmp_path: Path, other: Callable[[], None]) -> None:
    export(pin := placed(), tmp_path / "model.tar")
    other()
    with pytest.raises(ModelError, match=rf"holds org/model with sha256 {pin.sha256}, expected {'0' * 64}$"):
        import_(tmp_path / "model.tar", sha256="0" * 64)
    with pytest.raises(ModelError, match=rf"holds org/model with sha256 {pin.sha256}, expected {'1' * 64}$"):
        import_(tmp_path / "model.tar", pinned={"org/model": "1" * 64})
    assert held() == []


def member(name: str, content: bytes = b"", **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, content


def tar(*members: tuple[tarfile.TarInfo, bytes], format: int = tarfile.GNU_FORMAT) -> bytes:
    """A tar of these members, whose sizes may be lies."""
    made = b""
    for info, content in members:
        made += info.tobuf(format) + content + bytes(-len(content) % 512)
    return made + bytes(1024)


def manifest(**changes: Any) -> tuple[tarfile.TarInfo, bytes]:
    values = to_dict(placed()) | changes
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    return member("pin.json", json.dumps({"pin": values, "sha256": digest}).encode())


def pinned(*names: str) -> dict[str, dict[str, Any]]:
    """Files for a pin, with names that it should not have."""
    return {name: {"sha256": "0" * 64, "size": 4} for name in (*FILES, *names)}


def hostile() -> Iterator[tuple[str, bytes, str]]:
    files = [member(name, FILES[name]) for name in sorted(FILES)]
    swapped = [member("../../canary", FILES["config.json"]), *files[1:]]
    yield "no tar", b"PK\x03\x04" * 200, "no pin.json where expected"
    yield "empty", b"", "no pin.json where expected"
    yield "zeros", bytes(10_240), "no pin.json where expected"
    yield "no manifest", tar(*files), "expected the file pin.json next"
    yield "a member that climbs", tar(manifest(), *swapped), "expected the file config.json next"
    yield (
        "a pin that climbs",
        tar(manifest(files=pinned("../canary")), *files),
        "files=../canary: expected no others",
    )
    yield (
        "an absolute name",
        tar(manifest(files=pinned("/canary")), *files),
        "files=/canary: expected no others",
    )
    yield "code", tar(manifest(files=pinned("modeling.py")), *files), "files=modeling.py: expected no others"
    yield "a pickle", tar(manifest(files=pinned("pytorch_model.bin")), *files), "expected no others"
    yield (
        "a hub id that climbs",
        tar(manifest(hub="../../canary"), *files),
        "hub=../../canary: expected an id",
    )
    yield "a later version", tar(manifest(version=2), *files), "version=2: expected 1"
    yield "a key more", tar(manifest(canary=1), *files), "canary: unknown key"
    yield "no JSON", tar(member("pin.json", b"{"), *files), "its pin.json is damaged"
    yield "deep JSON", tar(member("pin.json", b"[" * 60_000), *files), "its pin.json is damaged"
    yield "a list", tar(member("pin.json", b"[]"), *files), "its pin.json is damaged"
    yield "a large manifest", tar(member("pin.json", b" " * 70_000), *files), "has 70000 bytes"
    yield "a huge manifest", tar(member("pin.json", size=2**62), *files), "bytes, expected at most 65536"
    yield "a negative size", tar(member("pin.json", size=-512), *files), "another member"
    for kind in (
        tarfile.SYMTYPE,
        tarfile.LNKTYPE,
        tarfile.DIRTYPE,
        tarfile.FIFOTYPE,
        tarfile.CHRTYPE,
        tarfile.XHDTYPE,
    ):
        link = member("config.json", FILES["config.json"], type=kind, linkname="/etc/passwd")
        yield f"type {kind!r}", tar(manifest(), link, *files[1:]), "expected the file config.json next"
    lie = member("config.json", FILES["config.json"], size=2**50)
    yield "a huge member", tar(manifest(), lie, *files[1:]), "config.json has not the size"
    huge = pinned() | {"model.safetensors": {"sha256": "0" * 64, "size": 2**45}}
    yield "a huge pin", tar(manifest(files=huge), *files), "cut off, .* bytes are missing"
    yield "another order", tar(manifest(), *reversed(files)), "expected the file config.json next"
    yield "a member less", tar(manifest(), *files[:2]) + bytes(2048), "no vocab.txt where expected"
    yield "extended headers", tar(manifest(), member("config.json", b"x" * 22, uname="é" * 40)), "cut off"


def test_whatever_else_stands_in_a_file_is_not_unpacked(tmp_path: Path, other: Callable[[], None]) -> None:
    cases = list(hostile())
    other()
    assert held() == []
    for name, content, message in cases:
        file = tmp_path / "bad.tar"
        file.write_bytes(content)
        with pytest.raises(ModelError, match=message) as caught:
            import_(file)
        assert "\n" not in str(caught.value), name
        assert held() == [], name
        assert not list(tmp_path.rglob("*canary*")), name
    assert len(cases) >= 28


def test_any_changed_byte_is_seen_or_changes_nothing(tmp_path: Path, other: Callable[[], None]) -> None:
    """A byte is harmless where a header's numbers are written otherwise but mean the same; never in a file or pin."""
    export(pin := placed(), file := tmp_path / "model.tar")
    whole = file.read_bytes()
    other()
    chance = random.Random(0)
    places = chance.sample(range(len(whole)), count(150, 2000))
    refused = 0
    for place in places:
        file.write_bytes(
            whole[:place] + bytes([whole[place] ^ (1 << chance.randrange(8))]) + whole[place + 1 :]
        )
        try:
            assert import_(file) == pin == find("org/model")
            assert {path.name: path.read_bytes() for path in pin.folder.iterdir()} == FILES
            shutil.rmtree(models_folder())
        except ModelError:
            assert held() == []
            refused += 1
    # What stays is the zeros at the end, which nobody needs.
    assert refused > 0.6 * len(places)


def test_any_end_that_is_cut_off_is_seen(tmp_path: Path, other: Callable[[], None]) -> None:
    export(placed(), file := tmp_path / "model.tar")
    whole = file.read_bytes()
    other()
    lengths = range(0, len(whole), 97)
    for length in lengths:
        file.write_bytes(whole[:length])
        with pytest.raises(
            ModelError, match=r"model\.tar: (cut off|no pin\.json|its pin\.json is damaged|damaged between)"
        ):
            import_(file)
        assert held() == []
    assert len(lengths) > 50


def test_an_import_that_is_interrupted_leaves_nothing(tmp_path: Path, other: Callable[[], None]) -> None:
    export(placed(), file := tmp_path / "model.tar")
    other()

    def interrupt(name: str, done: int, total: int) -> None:
        if name == "model.safetensors":
            assert done == total
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_(file, progress=interrupt)
    assert held() == []


def test_an_export_that_is_interrupted_leaves_nothing(tmp_path: Path) -> None:
    pin = placed()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = sorted(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        export(pin, tmp_path / "model.tar", progress=interrupt)
    assert sorted(tmp_path.iterdir()) == before


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"x\.tar: cannot be read \(No such file or directory\)$"):
        import_(tmp_path / "x.tar")
    with pytest.raises(ModelError, match=r"cannot be read \(Is a directory\)$"):
        import_(tmp_path)
