"""Ways to break a site with planted data: its table, what it calls, what stands in the way of a run."""

import os
import shutil
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message, MessageType

import clients.client_app
import clients.guard
import clients.opened
import clients.site
import fedmed.data.table
import fedmed.flower.in_process
import fedmed.privacy.chain
import fedmed.privacy.dpsgd
import fedmed.privacy.histogram
import fedmed.privacy.plan
import fedmed.privacy.release
import fedmed.training
from clients.folder import IDENTITY, KEY, LEDGER, POLICY
from fedmed.errors import DataError, FedmedError
from fedmed.privacy.events import to_json
from fedmed.privacy.ledger import Ledger
from fedmed.records import Arrays, Instruction, read_quote, to_bytes
from tests.clients.planted import COLUMNS, HASH, ID, MARK, NUMBER, Planted
from tests.clients.sites import (
    GENEROUS,
    ask,
    change_policy,
    instruction,
    ledger_of,
)

SAID = f"patient {ID}-a-0 {MARK} Ada at /data/{MARK}/scan0.dcm {HASH} {NUMBER}"


@dataclass
class Stage:
    """One site with planted data, talked to as a coordinator would; all that was seen of it."""

    planted: Planted
    site: Path
    patch: pytest.MonkeyPatch
    asked: Instruction
    arrays: Arrays
    replies: list[Message] = field(default_factory=list)

    def quote(self) -> None:
        self.replies.append(ask(self.site, MessageType.QUERY, replace(self.asked, round=0)))

    def rounds(self) -> None:
        self.replies += [
            ask(self.site, MessageType.TRAIN, replace(self.asked, round=n), self.arrays) for n in (1, 2)
        ]
        self.replies.append(ask(self.site, MessageType.EVALUATE, replace(self.asked, round=2), self.arrays))
        self.replies.append(ask(self.site, f"{MessageType.QUERY}.end", self.asked))

    @property
    def errors(self) -> list[tuple[int, str]]:
        return [(reply.error.code, reply.error.reason) for reply in self.replies if reply.has_error()]

    @property
    def refusal(self) -> str | None:
        reply = self.replies[0]
        return None if reply.has_error() else read_quote(reply.content).refusal

    def left(self) -> bytes:
        """Every byte that left the site."""
        parts = [
            f"{reply.error.code} {reply.error.reason}".encode()
            if reply.has_error()
            else to_bytes(reply.content)
            for reply in self.replies
        ]
        return b"\n".join(parts)


# Data that cannot be used: the round fails.

Action = Callable[[Stage], object]


def content(text: bytes) -> Action:
    def write(stage: Stage) -> None:
        stage.planted.path.write_bytes(text)
        stage.planted.remember()

    return write


def changed(old: str, new: str) -> Action:
    """The file with a text exchanged."""

    def write(stage: Stage) -> None:
        text = stage.planted.path.read_text()
        assert old in text
        stage.planted.path.write_text(text.replace(old, new))
        stage.planted.remember()

    return write


def every(column: str, value: str, only: int | None = None) -> Action:
    return lambda stage: stage.planted.put(column, value, only=only)


def renamed(column: str, name: str) -> Action:
    return lambda stage: stage.planted.write(header=[name if c == column else c for c in COLUMNS])


def folder_instead(stage: Stage) -> None:
    stage.planted.path.unlink()
    stage.planted.path.mkdir()


def unreadable(stage: Stage) -> None:
    """Not by its mode, which does not hold for root."""

    def refuse(self: Path) -> bytes:
        raise PermissionError(13, f"Permission denied: {SAID}", str(self))

    stage.patch.setattr(Path, "read_bytes", refuse)


def reencoded(encoding: str) -> Action:
    def write(stage: Stage) -> None:
        text = stage.planted.path.read_text() + "a,é,,,,,1,f,1\n"
        stage.planted.path.write_bytes(text.encode(encoding))
        stage.planted.remember()

    return write


def without_header(stage: Stage) -> None:
    stage.planted.write(header=stage.planted.rows.pop(0))


def few(patients: int) -> Action:
    def keep(stage: Stage) -> None:
        stage.planted.rows[:] = [
            row for row in stage.planted.rows if int(row[1].rpartition("-")[2]) < patients
        ]
        stage.planted.write()

    return keep


BAD_DATA: dict[str, Action] = {
    "missing file": lambda stage: stage.planted.path.unlink(),
    "folder instead of a file": folder_instead,
    "unreadable file": unreadable,
    "device instead of a file": lambda stage: (stage.planted.path.unlink(), os.mkfifo(stage.planted.path)),
    "empty file": content(b""),
    "binary junk": content(bytes(range(256)) * 64 + SAID.encode() + b"\x00" * 99),
    "wrong encoding": reencoded("latin-1"),
    "another wrong encoding": reencoded("utf-16"),
    "header alone": lambda stage: (stage.planted.rows.clear(), stage.planted.write()),
    "header missing": without_header,
    "header duplicated": renamed("name", "age"),
    "another separator": changed(",", ";"),
    "label column missing": renamed("sick", f"{MARK} sickness"),
    "patient column missing": renamed("id", f"{MARK} identity"),
    "site column missing": renamed("site", f"{MARK} ward"),
    "feature column missing": renamed("age", f"{MARK} years"),
    "surplus cells": changed(f"{MARK} Ada 3,", f"{MARK} Ada 3,{SAID},{SAID},"),
    "a quote that is never closed": changed(f"b-39,{MARK} Ada", f'b-39,"{MARK} Ada'),
}  # fmt: skip

# Data of which nothing, or too little for a part, can be used: a failure would tell that nobody is there.

NO_DATA: dict[str, Action] = {
    "no row of the site": every("site", f"{MARK} hospital"),
    "every id blank": every("id", ""),
    "every label undeclared": every("sick", f"{MARK} positive"),
    "every number a word": every("age", SAID),
    "every number infinite": every("age", "inf"),
    "every category undeclared": every("sex", SAID),
    "one patient": few(1),
}  # fmt: skip


# Data of which a part cannot be used: the site goes on, and keeps to itself what it left out.

ODD_DATA: dict[str, Action] = {
    "some numbers are words": every("age", SAID, 5),
    "some numbers are infinite": every("age", "-Infinity", 5),
    "some numbers are huge": every("age", f"{NUMBER}e307", 5),
    "some numbers are NaN": every("age", "NaN", 5),
    "some numbers are blank": every("age", "", 5),
    "some categories are undeclared": every("sex", f"{MARK} unknown", 5),
    "some labels are undeclared": every("sick", f"{MARK} perhaps", 5),
    "some labels are blank": every("sick", "", 5),
    "some ids are blank": changed(f"{ID}-a-3,", ","),
    "all of one class": every("sick", "1"),
    "a huge cell": every("name", SAID * 10_000, 2),
    "cells with line breaks and quotes": every("name", f'"{SAID}"\n"{SAID}",', 5),
    "cells with control characters": every("name", f"\x1b[2J\r{SAID}\x07", 5),
    "many records of one patient": changed(f"{ID}-a-3,", f"{ID}-a-4,"),
}


# Whatever raises with a record's values in its message.


class Panic(BaseException):
    """As a library written in Rust raises it."""


def decoding() -> UnicodeDecodeError:
    return UnicodeDecodeError("utf-8", SAID.encode(), 0, 1, SAID)


def chained() -> Exception:
    error = ValueError(SAID)
    error.__cause__ = KeyError(SAID)
    error.add_note(SAID)
    return error


KINDS: list[Callable[[], BaseException]] = [
    chained,
    lambda: KeyError(SAID),
    lambda: OSError(5, SAID, f"/data/{MARK}/scan0.dcm"),
    lambda: DataError(SAID),
    lambda: MemoryError(SAID),
    lambda: SystemExit(SAID),
    lambda: Panic(SAID),
    decoding,
    lambda: RecursionError(SAID),
    lambda: sqlite3.DatabaseError(SAID),
    lambda: ExceptionGroup(SAID, [ValueError(SAID)]),
    lambda: StopIteration(SAID),
]
PLACES: list[tuple[Any, str]] = [
    *((clients.client_app, name) for name in ("read_instruction", "open_guard", "_site", "_reply")),
    *((clients.guard, name) for name in ("digest", "to_json", "not_private")),
    *((clients.site, name) for name in (
        "own_plan", "load", "work", "one_thread", "version_of", "read_site", "local_parts", "_parts", "_prepared",
        "_model", "_source", "train", "patient_logits", "private_score", "build", "metrics_plans", "_digest")),
    *((fedmed.data.table, name) for name in (
        "read_csv", "_parse_csv", "_check_columns", "_parse", "_features", "held_out", "sentence", "blank_cells")),
    *((fedmed.training, name) for name in (
        "set_adapter", "private_step", "check_sound", "_losses", "_chunks", "_optimizer", "select")),
    *((fedmed.privacy.dpsgd, name) for name in ("ClippedSum", "noised")),
    (fedmed.privacy.plan.PrivacyPlan, "sample_patients"),
    (fedmed.privacy.histogram.HistogramPlan, "count"), (fedmed.privacy.histogram.HistogramPlan, "release"),
    *((Ledger, name) for name in ("reserve", "open_data", "commit", "head", "refresh")),
    *((fedmed.privacy.release, name) for name in (
        "update_record", "private_scores_record", "to_bytes", "head_record", "_drawn")),
    (fedmed.privacy.release.Gate, "release"),
]  # fmt: skip


# What stands in the way before data is opened: refusals, and codes.


def exhausted(stage: Stage) -> None:
    with ledger_of(stage.site) as ledger:
        event = to_json(stage.asked.plans["a"].event(rounds=1))
        cohort = ledger.account.cohort("default")
        assert cohort.budget is not None
        rounds = cohort.budget.rounds_that_fit(cohort.charges, event)
        ledger.hold("another", cohort="default", purpose="train", event=event, rounds=rounds)


def policy(**values: Any) -> Action:
    return lambda stage: change_policy(
        stage.site, **{**GENEROUS, "metrics": {"held_out": "private"}, "cohort": "default", **values}
    )


def model(stage: Stage, folder: str, sha256: str) -> None:
    overrides = [text for text in stage.planted.settings if text != "model=logistic"]
    overrides += ["model=hf", f"model.path={folder}", f"model.sha256={sha256}"]
    stage.asked = instruction(overrides, run_id=stage.asked.run_id)
    policy(models=({"id": Path(folder).name, "sha256": sha256},))(stage)


def wrong_model(stage: Stage) -> None:
    folder = stage.site.parent / "encoder"
    folder.mkdir()
    (folder / "model.safetensors").write_text(SAID)
    (folder / "config.json").write_text("{}")
    model(stage, str(folder), "0" * 64)


def locked(stage: Stage) -> None:
    stage.patch.setattr(fedmed.privacy.chain, "BUSY_SECONDS", 0.01)
    holding = sqlite3.connect(stage.site / LEDGER)
    holding.execute("BEGIN EXCLUSIVE")
    KEPT.append(holding)


KEPT: list[sqlite3.Connection] = []


def read_only(stage: Stage) -> None:
    guard = clients.opened.open_guard(str(stage.site))
    guard.ledger._connection.execute("PRAGMA query_only=ON")


def full(stage: Stage) -> None:
    connection = clients.opened.open_guard(str(stage.site)).ledger._connection
    pages = connection.execute("PRAGMA page_count").fetchone()[0]
    connection.execute(f"PRAGMA max_page_count={pages}")
    with ledger_of(stage.site) as ledger:
        # What is free within the pages is used up.
        for index in range(40):
            ledger.request(f"{index}", what={"task": "x" * 200, "digest": ""})
    pages = connection.execute("PRAGMA page_count").fetchone()[0]
    connection.execute(f"PRAGMA max_page_count={pages}")
    with ledger_of(stage.site) as ledger:
        ledger._connection.execute(f"PRAGMA max_page_count={pages}")
        for index in range(1000):
            try:
                ledger.request(f"fill {index}", what={"task": "x", "digest": ""})
            except FedmedError:
                return


def tampered(**changes: Any) -> Action:
    def change(stage: Stage) -> None:
        plan = replace(stage.asked.plans["a"], **changes)
        stage.asked = replace(stage.asked, plans={**stage.asked.plans, "a": plan})

    return change


# By name: what is done, and what the answer to the quote then begins with; None: no answer but the constant.
STANDS = "the site's policy refuses: "
REFUSED: dict[str, tuple[Action, str | None]] = {
    "task not listed": (policy(tasks=(f"{MARK} study",)), f"{STANDS}task"),
    "model not listed": (policy(scratch_models=("mlp",)), f"{STANDS}model"),
    "adapter not listed": (policy(adapters=("lora",)), f"{STANDS}adapter"),
    "too small": (policy(min_declared_size=5000), f"{STANDS}declared_size"),
    "too little noise": (policy(min_noise_multiplier=50.0), f"{STANDS}noise_multiplier"),
    "too many steps": (policy(max_steps=1), f"{STANDS}steps"),
    "too costly": (policy(epsilon_per_run=0.5), f"{STANDS}epsilon"),
    "no metrics allowed": (policy(metrics={"held_out": "none"}), f"{STANDS}metrics"),
    "another plan": (tampered(declared_size=5), f"{STANDS}plan"),
    "budget used up": (exhausted, f"{STANDS}budget: asked 2 rounds, allowed at most 0"),
    "cohort without a budget": (policy(cohort="elsewhere"), "budget"),
    "model missing": (lambda stage: model(stage, "/nowhere/encoder", "0" * 64), "model-unavailable"),
    "model of another digest": (wrong_model, "model-unavailable"),
    "ledger locked": (locked, "ledger-unavailable"),
    "ledger read-only": (read_only, "ledger-unavailable"),
    "ledger full": (full, "ledger-unavailable"),
    "ledger damaged": (lambda stage: (stage.site / LEDGER).write_bytes(SAID.encode() * 999), None),
    "ledger missing": (lambda stage: (stage.site / LEDGER).unlink(), None),
    "key damaged": (lambda stage: (stage.site / KEY).write_text(SAID), None),
    "identity damaged": (lambda stage: (stage.site / IDENTITY).write_text(SAID), None),
    "policy damaged": (lambda stage: (stage.site / POLICY).write_text("name: [\n"), None),
    "folder open to others": (lambda stage: stage.site.chmod(0o755), None),
    "folder gone": (lambda stage: shutil.rmtree(stage.site), None),
}  # fmt: skip
