"""Runs of a consortium of real processes: how far they are, and whether all that they left behind agrees."""

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from experiments.shared.consortium import COORDINATOR, Consortium
from fedmed.privacy.reader import read_account
from strategies.folder import RECEIPTS
from tests.commands import light

NAMES = ("Cleveland", "Hungary")
SIZES = "task.declared_sizes={Cleveland: 304, Hungary: 293}"
RUN = [
    "model=logistic", "task=heart", SIZES, "task.split=hash", "privacy.epsilon=null", "privacy.noise_multiplier=20",
    "privacy.delta=1e-5", "privacy.metrics=none", "tracking=none", "federation.timeout=15", "federation.quorum=0.5",
]  # fmt: skip


def rounds_sent(consortium: Consortium, name: str) -> int:
    folder = consortium.run_folder(name)
    journal = folder / "journal.jsonl" if folder else None
    return journal.read_text().count("round-sent") if journal and journal.exists() else 0


def ended(consortium: Consortium, name: str) -> bool:
    return (consortium.run_folder(name) or Path("none")).joinpath("summary.json").exists()


def began(consortium: Consortium, *overrides: str, name: str, rounds: int, until: int) -> None:
    """A run, launched, that has sent some rounds."""
    consortium.launch(*RUN, *overrides, f"rounds={rounds}", name=name)
    consortium.wait(lambda: rounds_sent(consortium, name) >= until, timeout=180)


def agree(consortium: Consortium, name: str) -> list[dict[str, Any]]:
    """The rounds of a run that has ended, each finished once; no site's ledger was charged for other than it says."""
    consortium.wait(lambda: ended(consortium, name), timeout=240)
    history = consortium.history(name)
    assert [entry["round"] for entry in history] == list(range(1, len(history) + 1))
    folder = consortium.run_folder(name)
    assert folder is not None
    run_id = json.loads((folder / "plans.json").read_text())["run_id"]
    receipts = [json.loads(line) for line in (folder / RECEIPTS).read_text().splitlines()]
    for site in consortium.names:
        account, _ = read_account(consortium.site(site) / "ledger.db")
        charged = account.drawn(run_id)
        if site in history[-1]["sites"]:
            assert history[-1]["spent"][site] == charged, (site, charged, history[-1])
        # Of one that is away the coordinator knows no more than what it was sent.
        assert history[-1]["spent"][site] >= charged, (site, charged, history[-1])
        assert charged >= sum(site in entry["sites"] for entry in history)
        heads = [receipt["head"] for receipt in receipts if receipt["site"] == site]
        if heads:
            # What the coordinator holds a receipt for is in the ledger.
            checked = consortium.do(
                "privacy",
                "verify",
                "--receipts",
                str(folder),
                "--site",
                str(consortium.site(site)),
                check=False,
            )
            assert checked.returncode == 0, checked.stdout + checked.stderr
    return history


def children(consortium: Consortium, module: str) -> list[psutil.Process]:
    """The coordinator's processes that run a module."""
    found = []
    for process in psutil.Process(consortium.processes[COORDINATOR].pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if module in process.cmdline():
                found.append(process)
    return found


def in_a_fork(words: Sequence[str], folder: Path) -> tuple[int, str, str]:
    done = light()(*words, cwd=folder)
    return done.code, done.out, done.err
