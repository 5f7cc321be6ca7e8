"""Real site folders on a small table, and runs through them."""

import contextlib
import dataclasses
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Context, Message, MessageType, RecordDict

import strategies.cli
from clients.client_app import app
from clients.folder import LEDGER, POLICY, SiteFolder
from clients.policy import Policy
from clients.policy_file import render
from fedmed.compose import compose
from fedmed.flower.in_process import InProcessGrid
from fedmed.models.build import build
from fedmed.privacy.account import Account
from fedmed.privacy.ledger import Ledger
from fedmed.privacy.plan import make_plan
from fedmed.records import Arrays, Instruction, Quote, instruction_record, read_quote, to_bytes

TITLE = "a small table"
SIZES = {"a": 60, "b": 60}
# Enough held-out patients for private metrics to be worth something.
LARGE = "task.declared_sizes={a: 600, b: 600}"
PRIVATE_METRICS = ("privacy.metrics=private", "privacy.metrics_epsilon=8", LARGE)
# All of it together costs some 9.
GENEROUS: dict[str, Any] = {
    "data": "*", "patient_column": "id", "tasks": (TITLE,), "needs_approval": False, "reply_grid_seconds": 0.0,
    "epsilon_per_run": 15.0, "epsilon_total": 90.0,
}  # fmt: skip


def table(path: Path) -> Path:
    """Forty patients a site, one to three records each."""
    draws = np.random.default_rng(4)
    lines = ["site,id,age,sick"]
    for site in SIZES:
        for patient in range(40):
            lines += [
                f"{site},{site}{patient},{draws.integers(100)},{draws.integers(2)}"
                for _ in range(1 + patient % 3)
            ]
    path.write_text("\n".join(lines) + "\n")
    return path


def settings(path: Path, *overrides: str) -> list[str]:
    """A private run of two rounds on the table; nobody is waited for long."""
    return [
        "task=csv", f"task.title={TITLE}", f"task.path={path}", "task.site_column=site", "task.label=sick",
        "task.patient_column=id", "task.declared_sizes={a: 60, b: 60}",
        "task.columns={age: {kind: numeric, low: 0, high: 100}}", "model=logistic", "tracking=none", "rounds=2",
        "training.sample_rate=0.5", "training.steps_per_round=3", "privacy.metrics=none",
        "federation.approval_timeout=0", *overrides,
    ]  # fmt: skip


def make_sites(
    parent: Path, *names: str, held_out: str = "none", budget: float | None = 30.0, **policy: Any
) -> Path:
    """A folder with one site's folder for each name: policy, cohort and budget as an officer would set them."""
    parent.mkdir(parents=True, exist_ok=True)
    for name in names or tuple(SIZES):
        make_site(parent / name, name, held_out=held_out, budget=budget, **policy)
    return parent


def make_site(path: Path, name: str, *, held_out: str, budget: float | None, **policy: Any) -> SiteFolder:
    path.parent.mkdir(parents=True, exist_ok=True)
    SiteFolder.init(path, name=name)
    change_policy(path, **{**GENEROUS, "metrics": {"held_out": held_out}, **policy})
    with ledger_of(path) as ledger:
        ledger.add_cohort("default", declared_size=600, by="officer")
        if budget is not None:
            ledger.set_budget("default", epsilon=budget, delta=1e-5, by="officer", why="a test")
    return SiteFolder.open(path)


def change_policy(path: Path, **policy: Any) -> None:
    """A site.yaml with these values. A process that has opened the site already keeps the earlier one."""
    (path / POLICY).write_text(render(Policy(name=path.name, **policy)))


@contextlib.contextmanager
def ledger_of(path: Path) -> Iterator[Ledger]:
    """The ledger of a site's folder, as another process would open it."""
    ledger = Ledger(path / LEDGER, SiteFolder.open(path))
    try:
        yield ledger
    finally:
        ledger.close()


def account(path: Path) -> Account:
    with ledger_of(path) as ledger:
        return ledger.account


def entries(path: Path) -> list[dict[str, Any]]:
    """What the ledger holds, oldest first, without what the officer wrote before any run."""
    with ledger_of(path) as ledger:
        found = [entry.values for entry in ledger.entries()]
    return [values for values in found if values["kind"] not in ("site", "cohort", "budget")]


def states(path: Path) -> list[str]:
    """The charges' states, in the order in which they were written; other entries by their kind."""
    return [values.get("state", values["kind"]) for values in entries(path)]


def run(overrides: list[str]) -> tuple[dict[str, Any], str]:
    """`fedmed run` here; its summary and what it said."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        strategies.cli.run(overrides)
    text = said.getvalue()
    return json.loads(Path(text.strip().splitlines()[-1]).read_text()), text


def instruction(overrides: list[str], *, round: int = 1, run_id: str = "r") -> Instruction:
    """What a coordinator would send for these settings."""
    config = compose(overrides)
    plans = {site: make_plan(config, site) for site in config.task.declared_sizes}
    return Instruction.of(config, plans, run_id=run_id, round=round)


def start(asked: Instruction) -> Arrays:
    """The adapter at the beginning of a run."""
    return build(asked.task, asked.model, asked.adapter).initialise(asked.seed)


def ask(site: Path, kind: str, asked: Instruction, arrays: Arrays | None = None) -> Message:
    """The reply of the site in a folder, as any Flower would get it."""
    InProcessGrid(app, nodes=1)
    partition = list(asked.task.declared_sizes).index(site.name)
    context = Context(
        run_id=1, node_id=2, node_config={"partition-id": partition, "site-folder": str(site)},
        state=RecordDict(), run_config={},
    )  # fmt: skip
    reply: Message = app(message=Message(instruction_record(asked, arrays), 2, kind), context=context)
    return reply


def quoted(site: Path, asked: Instruction) -> Quote:
    """The site's answer to round 0."""
    return read_quote(ask(site, MessageType.QUERY, dataclasses.replace(asked, round=0)).content)


def trained(site: Path, asked: Instruction, arrays: Arrays | None = None) -> Message:
    """The site's answer to a round."""
    return ask(site, MessageType.TRAIN, asked, start(asked) if arrays is None else arrays)


def update(reply: Message) -> bytes:
    """The bytes of what a reply carries besides the ledger's head, which moves on."""
    assert reply.has_content()
    return to_bytes(RecordDict({name: record for name, record in reply.content.items() if name != "ledger"}))
