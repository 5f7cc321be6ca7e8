"""An entry is what was computed, found by all that it depends on, or it is not found."""

import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import fedmed.models.activations
from fedmed.models.activations import DTYPES, SUFFIX, ActivationCache, Source, digest_of, saturated

KEY = {"model": "a" * 64, "cut": 3}
SOURCE = Source.of(data="site a", content="1")
VALUES = torch.arange(60, dtype=torch.float32).reshape(5, 4, 3) / 7


class Pieces:
    """Yields values two rows at a time, and counts how often it was asked."""

    def __init__(self, values: Tensor = VALUES) -> None:
        self.values, self.calls = values, 0

    def __call__(self) -> Iterator[Tensor]:
        self.calls += 1
        yield from self.values.split(2)


def cache(folder: Path, max_bytes: int = 10**6) -> ActivationCache:
    return ActivationCache(folder / "cache", max_bytes)


def ask(
    kept: ActivationCache,
    pieces: Pieces,
    *,
    key: dict[str, object] = KEY,
    source: Source = SOURCE,
    records: str = "r",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    return kept.tensor(
        key, source=source, records=records, rows=len(pieces.values), dtype=dtype, pieces=pieces
    )


@pytest.mark.parametrize("name", DTYPES)
def test_the_second_time_nothing_is_computed_and_the_values_are_the_same(tmp_path: Path, name: str) -> None:
    pieces, dtype = Pieces(), DTYPES[name]
    first = ask(cache(tmp_path), pieces, dtype=dtype)
    second = ask(cache(tmp_path), pieces, dtype=dtype)
    assert pieces.calls == 1
    assert first.dtype == second.dtype == dtype
    assert torch.equal(first, VALUES.to(dtype))
    assert torch.equal(second, first)


def test_another_process_finds_it(tmp_path: Path) -> None:
    ask(cache(tmp_path), Pieces())
    code = (
        "from tests.fedmed.models.test_activations import *\n"
        f"pieces = Pieces(); found = ask(cache(Path({str(tmp_path)!r})), pieces)\n"
        "assert pieces.calls == 0 and torch.equal(found, VALUES)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("key", "records"),
    [({**KEY, "model": "b" * 64}, "r"), ({**KEY, "cut": 4}, "r"), ({**KEY, "more": 1}, "r"), (KEY, "s")],
)
def test_whatever_differs_is_another_entry(tmp_path: Path, key: dict[str, object], records: str) -> None:
    ask(cache(tmp_path), Pieces())
    other = Pieces(VALUES + 1)
    assert torch.equal(ask(cache(tmp_path), other, key=key, records=records), VALUES + 1)
    assert other.calls == 1


def test_what_was_computed_of_an_earlier_content_is_removed(tmp_path: Path) -> None:
    """Whoever was taken out of the data is not kept in a file of activations."""
    kept = cache(tmp_path)
    elsewhere = Source.of(data="site b", content="1")
    ask(kept, Pieces(), source=elsewhere)
    ask(kept, Pieces())
    ask(kept, Pieces(), key={**KEY, "cut": 5})
    ask(kept, Pieces(), records="another task's")
    assert len(kept.entries()) == 4
    ask(kept, Pieces(VALUES[1:]), source=Source.of(data="site a", content="2"), records="without one")
    assert len(kept.entries()) == 2
    pieces = Pieces()
    ask(kept, pieces, source=elsewhere)
    assert pieces.calls == 0


def test_the_longest_unused_makes_room(tmp_path: Path) -> None:
    kept = cache(tmp_path, 3 * VALUES.numel() * 4 + 3 * 4096)
    keys = [{**KEY, "cut": cut} for cut in range(4)]
    for moment, key in enumerate(keys[:3]):
        ask(kept, Pieces(), key=key)
        for path in kept.entries()[-1:]:
            os.utime(path, ns=(moment, moment))
    held = ask(kept, Pieces(), key=keys[0])
    ask(kept, Pieces(), key=keys[3])
    calls = []
    for key in keys:
        pieces = Pieces()
        ask(cache(tmp_path, 10**6), pieces, key=key)
        calls.append(pieces.calls)
    assert calls == [0, 1, 0, 0]
    assert torch.equal(held, VALUES)


def test_a_mapped_entry_outlives_its_removal(tmp_path: Path) -> None:
    kept = cache(tmp_path)
    held = ask(kept, Pieces())
    assert kept.clear() > 0
    assert kept.entries() == []
    assert torch.equal(held, VALUES)


def test_what_is_too_large_is_computed_and_not_kept(tmp_path: Path) -> None:
    kept, pieces = cache(tmp_path, 100), Pieces()
    assert torch.equal(ask(kept, pieces), VALUES)
    assert list(kept.folder.iterdir()) == []


def test_a_folder_that_cannot_be_written_costs_time_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("a file where the folder would be")
    assert torch.equal(ask(cache(tmp_path), Pieces()), VALUES)
    assert "cannot be written" in caplog.text


def test_a_disk_that_fills_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fedmed.models.activations.os, "fsync", full)
    kept = cache(tmp_path)
    assert torch.equal(ask(kept, Pieces()), VALUES)
    assert list(kept.folder.iterdir()) == []


@pytest.mark.parametrize("where", ["magic", "header", "payload", "cut off", "longer", "empty"])
def test_a_damaged_entry_is_computed_anew(tmp_path: Path, where: str) -> None:
    kept = cache(tmp_path)
    ask(kept, Pieces())
    [path] = kept.entries()
    content = bytearray(path.read_bytes())
    if where in ("magic", "header", "payload"):
        content[{"magic": 3, "header": 40, "payload": 4096 + 17}[where]] ^= 1
    changed = {"cut off": content[:-1], "longer": content + b"\0", "empty": b""}.get(where, content)
    path.write_bytes(changed)
    pieces = Pieces()
    assert torch.equal(ask(kept, pieces), VALUES)
    assert pieces.calls == 1
    again = Pieces()
    ask(kept, again)
    assert again.calls == 0


def test_an_interrupted_computation_leaves_nothing(tmp_path: Path) -> None:
    def pieces() -> Iterator[Tensor]:
        yield VALUES[:2]
        raise KeyboardInterrupt

    kept = cache(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        kept.tensor(KEY, source=SOURCE, records="r", rows=5, dtype=torch.float32, pieces=pieces)
    assert list(kept.folder.iterdir()) == []


def test_rows_that_are_missing_are_noticed(tmp_path: Path) -> None:
    kept = cache(tmp_path)
    with pytest.raises(ValueError, match="2 rows of 5"):
        kept.tensor(
            KEY, source=SOURCE, records="r", rows=5, dtype=torch.float32, pieces=lambda: iter([VALUES[:2]])
        )


def test_only_their_owner_reads_them(tmp_path: Path) -> None:
    kept = cache(tmp_path)
    ask(kept, Pieces())
    assert stat.S_IMODE(kept.folder.stat().st_mode) == 0o700
    assert [stat.S_IMODE(path.stat().st_mode) for path in kept.entries()] == [0o600]


def test_writing_to_what_was_read_changes_no_entry(tmp_path: Path) -> None:
    kept = cache(tmp_path)
    ask(kept, Pieces()).zero_()
    assert torch.equal(ask(kept, Pieces()), VALUES)


def test_values_beyond_half_precision_are_cut_off_one_by_one() -> None:
    """Were the type chosen by the values, one record would change the precision of all."""
    values = torch.tensor([1e6, -1e6, 1.5, 65504.0])
    assert saturated(values, torch.float16).tolist() == [65504.0, -65504.0, 1.5, 65504.0]
    assert torch.isfinite(saturated(values, torch.bfloat16)).all()


def test_a_digest_changes_with_every_part_of_the_records() -> None:
    ids = torch.arange(6).reshape(2, 3)
    digests = {
        digest_of({"ids": ids}),
        digest_of({"ids": ids.reshape(3, 2)}),
        digest_of({"ids": ids.int()}),
        digest_of({"mask": ids}),
        digest_of({"ids": ids.flip(0)}),
        digest_of({"ids": ids, "mask": ids}),
    }
    assert len(digests) == 6
    assert digest_of({"ids": ids}) == digest_of({"ids": ids.clone()})


def test_entries_are_named_by_nothing_but_a_digest(tmp_path: Path) -> None:
    kept = cache(tmp_path)
    ask(kept, Pieces(), source=Source.of(data="Mercy Hospital", content="1"))
    [path] = kept.entries()
    assert len(path.name) == 64 + len(SUFFIX)
    assert b"Mercy" not in path.read_bytes()
    assert np.memmap(path, np.uint8).size == 4096 + VALUES.numel() * 4


def killed(folder: Path) -> Path:
    """A cache in which a process died while it wrote: what it leaves is of patients, too."""

    def pieces() -> Iterator[Tensor]:
        yield VALUES[:2].expand(1000, 2, 4, 3).flatten(0, 1)
        os.kill(os.getpid(), signal.SIGKILL)

    if not (child := os.fork()):
        cache(folder).tensor(KEY, source=SOURCE, records="r", rows=5, dtype=VALUES.dtype, pieces=pieces)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    [draft] = (folder / "cache").iterdir()
    assert draft.stat().st_size > 4096
    return draft


def test_what_a_killed_process_left_goes_when_all_is_cleared_or_after_a_day(tmp_path: Path) -> None:
    kept, draft = cache(tmp_path), killed(tmp_path)
    content = draft.read_bytes()
    assert kept.clear() == len(content)
    assert list(kept.folder.iterdir()) == []
    draft.write_bytes(content)
    ask(kept, Pieces())
    assert draft.exists(), "another process may be writing to it"
    os.utime(draft, (0, 0))
    ask(kept, Pieces(), records="others")
    assert not draft.exists()
    assert len(kept.entries()) == 2
