"""A site whose disk is full or cannot be written: training stops before data is touched. Needs root, for its mounts."""

import logging
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from flwr.app import MessageType

import clients.opened
import clients.site
from clients.folder import SiteError, SiteFolder
from fedmed.privacy.budget import Budget
from fedmed.records import Instruction, read_quote
from tests.clients.sites import (
    account,
    ask,
    instruction,
    make_site,
    quoted,
    settings,
    start,
    states,
    table,
    trained,
)


def mounted(*options: str) -> None:
    subprocess.run(["mount", *options], check=True, capture_output=True, timeout=30)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of one megabyte."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted("-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place))
    try:
        yield place
    finally:
        for path in list(clients.opened._open):
            clients.opened.close_guard(path)
        subprocess.run(["umount", "--lazy", str(place)], check=True, timeout=30)


@pytest.fixture
def no_data(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every opening of data."""
    calls: list[str] = []
    read = clients.site.read_site
    monkeypatch.setattr(
        clients.site, "read_site", lambda *a, **o: (calls.append("read_site"), read(*a, **o))[1]
    )
    return calls


@pytest.fixture
def site(disk: Path) -> Path:
    """A site on it."""
    return make_site(disk / "a", "a", held_out="none", budget=30).path


@pytest.fixture
def asked(tmp_path: Path) -> Instruction:
    """A round of a run whose data is elsewhere."""
    return instruction(settings(table(tmp_path / "t.csv")))


def promises(site: Path, asked: Instruction) -> bool:
    """Whether a site agrees to a run; one whose ledger cannot even be opened gives no answer."""
    reply = ask(site, MessageType.QUERY, asked)
    if reply.has_error():
        assert reply.error.reason == "site-failed"
        return False
    refusal = read_quote(reply.content).refusal
    assert refusal in (None, "ledger-unavailable")
    return refusal is None


def fill(disk: Path) -> Path:
    """Leave no byte free."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        for size in (4096, 1):
            while True:
                try:
                    file.write(b"x" * size)
                except OSError:
                    break
    return ballast


def test_a_full_disk_stops_a_run_before_it_is_promised_anything(
    disk: Path, site: Path, asked: Instruction, no_data: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    ballast = fill(disk)
    caplog.set_level(logging.INFO)
    assert not promises(site, asked)
    assert trained(site, asked).error.reason == "site-failed"
    assert "the disk is full; free some space on it; nothing was trained or released" in caplog.text
    assert no_data == []
    ballast.unlink()
    assert states(site) == []
    assert account(site).cohort("default").charges.total() == 0
    # Once there is room, the same process goes on.
    assert quoted(site, asked).refusal is None
    assert trained(site, asked).has_content()
    assert no_data


def test_a_disk_that_fills_up_after_the_promise_stops_the_round(
    disk: Path, site: Path, asked: Instruction, no_data: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert quoted(site, asked).refusal is None
    ballast = fill(disk)
    # The write-ahead log may have room for a few entries more; not for many.
    for number in range(200):
        reply = trained(site, asked, {name: v + number for name, v in start(asked).items()})
        if reply.has_error() and "the disk is full" in caplog.text:
            break
    assert "the disk is full; free some space on it" in caplog.text
    opened = len(no_data)
    assert trained(site, asked, {name: v - 1 for name, v in start(asked).items()}).has_error()
    assert len(no_data) == opened
    ballast.unlink()
    cohort = account(site).cohort("default")
    assert isinstance(cohort.budget, Budget)
    # What was promised is what may be used: not a round more.
    assert cohort.charges.total() == 2


def test_a_disk_that_is_mounted_read_only_stops_a_run_and_says_what_to_do(
    disk: Path, site: Path, asked: Instruction, no_data: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    mounted("-o", "remount,ro", str(disk))
    caplog.set_level(logging.INFO)
    assert not promises(site, asked)
    assert trained(site, asked).error.reason == "site-failed"
    assert "mount its disk read-write" in caplog.text
    assert no_data == []
    mounted("-o", "remount,rw", str(disk))
    assert states(site) == []


def test_no_site_is_made_on_a_full_disk(disk: Path) -> None:
    ballast = fill(disk)
    with pytest.raises(SiteError, match="No space left on device"):
        SiteFolder.init(disk / "a", name="a")
    ballast.unlink()
    assert not (disk / "a").exists()
    SiteFolder.init(disk / "a", name="a")
