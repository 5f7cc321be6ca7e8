"""`fedmed site start` as a process, with a SuperLink on loopback: one that is really stopped, killed and refused."""

import contextlib
import dataclasses
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message, MessageType

from clients.coordinator import CA
from clients.folder import IDENTITY, KEY, SiteFolder
from clients.start import LOCK, PLACE
from clients.status import is_well, status
from fedmed.records import Instruction, instruction_record, read_quote, read_update
from tests.clients.planted import MARK, leaks
from tests.clients.sites import (
    GENEROUS,
    change_policy,
    instruction,
    make_site,
    settings,
    start,
    states,
    table,
)
from tests.commands import Ended, heavy, wait_for
from tests.fedmed.flower.network import Network


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    made = Network(tmp_path_factory.mktemp("network"))
    made.start()
    yield made
    made.end()


def new_site(parent: Path, name: str, network: Network, *, admitted: bool = True, **policy: Any) -> Path:
    """A site's folder with budget and network, and its place at the coordinator."""
    site = make_site(parent / name, name, held_out="none", budget=30)
    change_policy(
        site.path, **{**GENEROUS, "metrics": {"held_out": "none"}, "coordinator": network.address, **policy}
    )
    (site.path / CA).write_bytes(network.ca)
    if admitted:
        control = network.control()
        control.register(name, site.public_key)
        control.close()
    return site.path


@dataclass
class Process:
    """A daemon that runs."""

    folder: Path
    pid: int = 0
    ended: list[Ended] = field(default_factory=list)

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    @property
    def state(self) -> str:
        return str(status(self.folder)["state"])

    @property
    def log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder.parent / "log").read_text().splitlines()]


@contextlib.contextmanager
def started(folder: Path, *, before: str = "") -> Iterator[Process]:
    """`fedmed site start`, until the block ends; then it is told to stop, and has to."""
    process, up = Process(folder), threading.Event()

    def during(pid: int, _: Path) -> None:
        process.pid = pid
        up.set()

    def run() -> None:
        log = str(folder.parent / "log")
        process.ended.append(
            heavy()("site", "start", str(folder), "--log", log, before=before, during=during)
        )

    thread = threading.Thread(target=run)
    thread.start()
    assert up.wait(60)
    try:
        yield process
    finally:
        if not process.ended:
            with contextlib.suppress(ProcessLookupError):
                process.signal(signal.SIGTERM)
        thread.join(60)
        assert not thread.is_alive()


def asked(
    network: Network, site: Path, asked: Instruction, kind: str, arrays: Any = None
) -> Callable[[], Message]:
    """Send a message as a coordinator would; the result waits for the reply."""
    task = network.task()
    task.begin()
    grid = network.grid(task)
    wait_for(lambda: site.name in grid.sites())
    message = Message(instruction_record(asked, arrays), grid.sites()[site.name], kind)
    replies: list[Message] = []
    thread = threading.Thread(target=lambda: replies.extend(grid.gather([message], timeout=60)))
    thread.start()

    def reply() -> Message:
        thread.join(90)
        assert len(replies) == 1
        grid.close()
        task.finish(ok=True, details="")
        return replies[0]

    return reply


def test_a_daemon_answers_and_says_how_it_is_and_shows_no_secret(network: Network, tmp_path: Path) -> None:
    site = new_site(tmp_path, "mercy", network)
    run = instruction(
        settings(table(tmp_path / "t.csv"), "task.declared_sizes={mercy: 60}"), run_id=f"run of {MARK}"
    )
    assert status(site)["state"] == "stopped"
    with started(site) as process:
        assert wait_for(lambda: process.state == "online")
        assert (site / PLACE).stat().st_mode & 0o077 == 0
        quote = asked(network, site, dataclasses.replace(run, round=0), MessageType.QUERY)()
        assert read_quote(quote.content).refusal is None
        values = status(site)
        assert is_well(values)
        assert (values["site"], values["run"], values["round"]) == ("mercy", run.run_id, 0)
        assert time.time() - values["last_contact"] < 30
        second = start_again(site)
        assert (second.code, second.out) == (2, "")
        assert "a daemon runs already" in second.err
    assert process.ended[0].code == 0, process.ended[0].err
    assert status(site)["state"] == "stopped"
    assert not (site / PLACE).exists()
    lines = process.log
    assert {"time", "level", "logger", "message"} == set(lines[0])
    assert any(line["message"].startswith("online: as node") for line in lines)
    assert any("answered" in line["message"] and MARK in line["message"] for line in lines)
    secrets = {(site / KEY).read_bytes().hex(), *secret_lines(site), network.secret.hex()}
    seen = (tmp_path / "log").read_bytes() + process.ended[0].out.encode() + process.ended[0].err.encode()
    assert len(secrets) > 4
    assert not leaks(seen, {secret.encode() for secret in secrets})


def secret_lines(site: Path) -> list[str]:
    lines = (site / IDENTITY).read_text().splitlines()
    return [line for line in lines if "PRIVATE" not in line]


def start_again(site: Path) -> Ended:
    """Another `fedmed site start` of the same folder."""
    from tests.commands import light

    return light()("site", "start", str(site))


SLOW = """
import time, pathlib, clients.site
work = clients.site.work
def slow(*a, **k):
    pathlib.Path({marker!r}).touch()
    time.sleep(3)
    return work(*a, **k)
clients.site.work = slow
"""


@pytest.mark.parametrize("times", [1, 2])
def test_a_signal_ends_after_the_present_message_and_a_second_one_at_once(
    times: int, network: Network, tmp_path: Path
) -> None:
    name = f"slow{times}"
    site = new_site(tmp_path, name, network)
    run = instruction(settings(table(tmp_path / "t.csv"), f"task.declared_sizes={{{name}: 60}}"))
    marker = tmp_path / "training"
    with started(site, before=SLOW.format(marker=str(marker))) as process:
        quote = asked(network, site, dataclasses.replace(run, round=0), MessageType.QUERY)()
        assert read_quote(quote.content).refusal is None
        reply = asked(network, site, run, MessageType.TRAIN, start(run))
        wait_for(marker.exists)
        for _ in range(times):
            process.signal(signal.SIGTERM)
            time.sleep(0.3)
        wait_for(lambda: process.ended)
        if times == 1:
            assert read_update(reply().content)[0].site == name
    if times == 1:
        assert process.ended[0].code == 0
        assert states(site) == ["hold", "reserved", "opened", "committed"]
    else:
        assert process.ended[0].code == -1
        # What was opened is spent.
        assert states(site) == ["hold", "reserved", "opened"]


def test_a_site_that_is_not_admitted_says_so_and_goes_on_once_it_is(network: Network, tmp_path: Path) -> None:
    site = new_site(tmp_path, "later", network, admitted=False)
    with started(site) as process:
        wait_for(lambda: process.state == "refused")
        values = status(site)
        assert values["refusal"] == "unknown-node"
        assert "fedmed coordinator admit" in values["next"]
        control = network.control()
        control.register("later", SiteFolder.open(site).public_key)
        wait_for(lambda: process.state == "online")
        control.close()
    assert (site / "later.pub").read_bytes().endswith(SiteFolder.open(site).public_key)


def test_a_coordinator_of_another_ca_is_refused(network: Network, tmp_path: Path) -> None:
    from tests.fedmed.flower.network import write_certificates

    site = new_site(tmp_path, "strict", network)
    other = tmp_path / "other"
    other.mkdir()
    write_certificates(other)
    (site / CA).write_bytes((other / "ca.pem").read_bytes())
    with started(site) as process:
        wait_for(lambda: process.state == "refused")
        assert status(site)["refusal"] == "wrong-ca"
        # Its engineer gets the right one: no restart is needed.
        (site / CA).write_bytes(network.ca)
        wait_for(lambda: process.state == "online")


def test_a_killed_daemon_leaves_the_folder_free(network: Network, tmp_path: Path) -> None:
    site = new_site(tmp_path, "killed", network)
    with started(site) as process:
        wait_for(lambda: process.state == "online")
        process.signal(signal.SIGKILL)
        wait_for(lambda: process.ended)
        assert (site / PLACE).exists()
        assert (site / LOCK).exists()
        assert status(site)["state"] == "stopped"
    with started(site) as process:
        wait_for(lambda: process.state == "online")
