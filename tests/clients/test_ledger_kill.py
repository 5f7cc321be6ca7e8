"""Killed at any moment of real training, a site's ledger shows at least every round that left."""

import contextlib
import json
import os
import random
import select
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import IO

import pytest

import clients.opened
from clients.folder import LEDGER, SiteFolder
from clients.folder import verify as verify_signature
from fedmed.privacy.verify import verify
from fedmed.records import Arrays, Instruction
from tests.clients.sites import (
    account,
    instruction,
    ledger_of,
    make_site,
    quoted,
    settings,
    start,
    table,
    trained,
    update,
)
from tests.conftest import count
from tests.evidence import figure

# In one life of the site process; more than it can do before it is killed.
ROUNDS = 40


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Instruction:
    path = table(tmp_path_factory.mktemp("data") / "t.csv")
    return instruction(
        settings(path, f"rounds={ROUNDS}", "privacy.epsilon=null", "privacy.noise_multiplier=20")
    )


def new_site(parent: Path) -> Path:
    return make_site(parent / "a", "a", held_out="none", budget=80, max_steps=10**6).path


def in_child(site: Path, asked: Instruction, arrays: Arrays, writing: int) -> None:
    """A site process: train round after round; what left is what the pipe took."""
    for number in range(1, ROUNDS + 1):
        reply = update(trained(site, replace(asked, round=number), arrays))
        os.write(writing, len(reply).to_bytes(4) + reply)


def lived(
    site: Path, asked: Instruction, arrays: Arrays, *, after: int, seconds: float
) -> tuple[list[bytes], bool]:
    """Start the process, kill it that long after so many replies; the replies that left, and whether it was killed."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        with contextlib.suppress(BaseException):
            os.close(reading)
            os.write(writing, b"!")
            in_child(site, asked, arrays, writing)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as file:
        assert file.read(1) == b"!"
        replies = [reply for _ in range(after) if (reply := whole_reply(file)) is not None]
        ended = os.pidfd_open(pid)
        select.select([ended], [], [], seconds)
        os.close(ended)
        os.kill(pid, signal.SIGKILL)
        while (reply := whole_reply(file)) is not None:
            replies.append(reply)
    killed = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    return replies, killed


def whole_reply(file: IO[bytes]) -> bytes | None:
    """The next reply of `in_child`; None where the process ended before it was whole."""
    size = file.read(4)
    reply = file.read(int.from_bytes(size))
    return reply if len(size) == 4 and len(reply) == int.from_bytes(size) else None


def test_killed_at_random_it_shows_every_round_that_left(tmp_path: Path, asked: Instruction) -> None:
    arrays = start(asked)
    # Warm: what a site computes once, its forks have. No ledger that they will use is open here.
    warm = new_site(tmp_path / "warm")
    quoted(warm, replace(asked, run_id="warm"))
    for number in range(1, 9):
        if number == 4:
            began = time.monotonic()
        assert trained(warm, replace(asked, run_id="warm", round=number), arrays).has_content()
    each = (time.monotonic() - began) / 5
    clients.opened.close_guard(str(warm))
    seed = int.from_bytes(os.urandom(4))
    print(f"seed {seed}")
    draws = random.Random(seed)
    total, kills, left, unfinished, site = count(8, 500), 0, 0, 0, Path()
    for index in range(total):
        if index % 20 == 0:
            # A ledger grows, and reading it takes longer: now and then another site.
            site = new_site(tmp_path / str(index))
            shutil.copy(warm / "key", site / "key")
        run = replace(asked, run_id=f"run {index}")
        with ledger_of(site) as ledger:
            ledger.hold(
                run.run_id, cohort="default", purpose="train", rounds=ROUNDS,
                event=next(hold.event for hold in account(warm).holds.values()),
            )  # fmt: skip
        # Anywhere between before the first round and in the sixth, however long a busy machine takes for a round.
        replies, killed = lived(site, run, arrays, after=index % 6, seconds=draws.uniform(0, each))
        kills += killed
        left += len(replies)
        # A fresh reader, as the next process of the site would be.
        with ledger_of(site) as ledger:
            attempts = [a for a in ledger.account.attempts.values() if a.run == run.run_id]
            committed = [a for a in attempts if a.state == "committed"]
            pending = [a for a in ledger.account.pending() if a.run == run.run_id]
            # At least what left, and at most one round that was about to.
            assert len(replies) <= len(committed) <= len(replies) + 1
            assert len(pending) <= 1
            assert len(attempts) == len(committed) + len(pending)
            unfinished += len(pending)
            # What was begun counts as spent; the rest is still promised.
            assert ledger.account.holds[run.run_id, "train"].left == ROUNDS - len(attempts)
            stored = ledger.replies()
        for attempt, reply in zip(committed, replies, strict=False):
            assert stored[attempt.nonce] == reply
        folder = SiteFolder.open(site)
        verdict = verify(
            site / LEDGER,
            verifies=lambda data, mark, key=folder.public_key: verify_signature(key, data, mark),
        )
        assert verdict.ok, verdict
        if index % 4 == 0:
            _repeated(site, run, arrays, replies, len(attempts))
    # A process that had done all its rounds before it was killed would prove nothing.
    assert kills > 0.8 * total
    assert left > 0
    figure("milliseconds a round", f"{1000 * each:.0f}")
    figure(
        "kills, replies that had left, rounds that were begun and never sent",
        f"{kills}, {left}, {unfinished}",
    )


def _repeated(site: Path, run: Instruction, arrays: Arrays, replies: list[bytes], spent: int) -> None:
    """The next process of the site answers what was answered with the same bytes, and charges nothing for it."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        with contextlib.suppress(BaseException):
            again = [update(trained(site, replace(run, round=n + 1), arrays)) for n in range(len(replies))]
            os.write(writing, json.dumps(again == replies).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as file:
        assert file.read() == "true"
    os.waitpid(pid, 0)
    assert sum(a.run == run.run_id for a in account(site).attempts.values()) == spent
