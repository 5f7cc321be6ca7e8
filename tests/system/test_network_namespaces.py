"""A consortium in which every machine has an address of its own: network namespaces on a bridge, whose cables are cut.
Needs root."""

import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from experiments.shared.consortium import COORDINATOR, Consortium
from tests.consortium.runs import NAMES, agree, began, children, rounds_sent

pytestmark = pytest.mark.timeout(900)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, timeout=30, capture_output=True)


def within(space: str) -> list[str]:
    return ["ip", "netns", "exec", space]


@dataclass
class Hospital:
    """Namespaces on a bridge, which stands in the coordinator's."""

    stem: str = field(default_factory=lambda: f"fm{os.getpid() % 10_000}")

    def space(self, name: str) -> str:
        number = 0 if name == COORDINATOR else 1 + NAMES.index(name)
        return f"{self.stem}-{number}"

    def make(self) -> None:
        hub = self.space(COORDINATOR)
        ip("netns", "add", hub)
        ip("-n", hub, "link", "set", "lo", "up")
        ip("-n", hub, "link", "add", "bridge", "type", "bridge")
        ip("-n", hub, "addr", "add", "10.77.0.1/24", "dev", "bridge")
        ip("-n", hub, "link", "set", "bridge", "up")
        for number, name in enumerate(NAMES, start=1):
            space, near, far = self.space(name), f"port{number}", f"{self.stem}v{number}"
            ip("netns", "add", space)
            ip("-n", space, "link", "set", "lo", "up")
            ip("link", "add", far, "netns", space, "type", "veth", "peer", "name", near, "netns", hub)
            ip("-n", space, "addr", "add", f"10.77.0.{1 + number}/24", "dev", far)
            ip("-n", space, "link", "set", far, "up")
            ip("-n", hub, "link", "set", near, "master", "bridge")
            ip("-n", hub, "link", "set", near, "up")

    def cable(self, name: str, state: str) -> None:
        """Pull a site's cable ("down"), or plug it in again ("up")."""
        ip("-n", self.space(COORDINATOR), "link", "set", f"port{1 + NAMES.index(name)}", state)

    def remove(self) -> None:
        for name in (COORDINATOR, *NAMES):
            subprocess.run(["ip", "netns", "del", self.space(name)], check=False, timeout=30)


@pytest.fixture(scope="module")
def hospital() -> Iterator[Hospital]:
    made = Hospital()
    try:
        made.make()
        yield made
    finally:
        made.remove()


@pytest.fixture(scope="module")
def consortium(tmp_path_factory: pytest.TempPathFactory, hospital: Hospital) -> Iterator[Consortium]:
    made = Consortium(
        tmp_path_factory.mktemp("spaces") / "c",
        NAMES,
        host="10.77.0.1",
        prefix={name: within(hospital.space(name)) for name in (COORDINATOR, *NAMES)},
        inside=within(hospital.space(COORDINATOR)),
    )
    made.make()
    made.start()
    yield made
    made.end()


def test_a_site_that_is_cut_off_for_half_a_minute_comes_back_by_itself(
    consortium: Consortium, hospital: Hospital
) -> None:
    began(consortium, name="cut", rounds=300, until=3)
    process = consortium.processes["Hungary"]
    hospital.cable("Hungary", "down")
    try:
        cut = rounds_sent(consortium, "cut")
        consortium.wait(lambda: rounds_sent(consortium, "cut") >= cut + 2, timeout=120)
        with pytest.raises(TimeoutError):
            consortium.wait(lambda: process.poll() is not None, timeout=30)
        # A cable that is back before anybody waited in vain is not even noticed.
        consortium.wait(lambda: "unreachable" in consortium.log("Hungary"), timeout=60)
    finally:
        hospital.cable("Hungary", "up")
    history = agree(consortium, "cut")
    assert len(history) == 300
    assert any("Hungary" not in entry["sites"] for entry in history)
    assert "Hungary" in history[-1]["sites"]
    assert process.poll() is None


def test_a_coordinator_that_is_killed_whole_goes_on_from_disk(consortium: Consortium) -> None:
    began(consortium, name="killed", rounds=12, until=4)
    every = psutil.Process(consortium.processes[COORDINATOR].pid).children(recursive=True)
    consortium.kill(COORDINATOR)
    _, alive = psutil.wait_procs(every, timeout=20)
    assert not alive
    consortium.start(COORDINATOR)
    consortium.wait(lambda: consortium.online() == set(NAMES), timeout=120)
    assert len(agree(consortium, "killed")) == 12


def test_a_killed_site_is_back_for_the_next_round(consortium: Consortium) -> None:
    began(consortium, name="site", rounds=12, until=3)
    consortium.kill("Hungary")
    consortium.start("Hungary")
    history = agree(consortium, "site")
    assert len(history) == 12
    assert "Hungary" in history[-1]["sites"]


def test_a_killed_superlink_and_a_killed_run_process_are_started_again(consortium: Consortium) -> None:
    began(consortium, name="servers", rounds=30, until=3)
    for module in ("fedmed.flower.superlink", "strategies.coordinator.worker"):
        (process,) = children(consortium, module)
        process.kill()
        sent = rounds_sent(consortium, "servers")
        consortium.wait(lambda sent=sent: rounds_sent(consortium, "servers") >= sent + 3, timeout=120)
    assert len(agree(consortium, "servers")) == 30


def test_without_encryption_only_loopback_is_served(consortium: Consortium, tmp_path: Path) -> None:
    consortium.do(
        "site",
        "init",
        str(tmp_path / "x"),
        "--name",
        "x",
        "--coordinator",
        "10.77.0.1:9092",
        "--ca",
        f"{COORDINATOR}/ca.pem",
    )
    refused = consortium.do("site", "start", str(tmp_path / "x"), "--insecure-for-testing", check=False)
    assert refused.returncode == 2
    assert "loopback" in refused.stderr
    home = tmp_path / "hub"
    consortium.do("coordinator", "init", str(home), "--name", "x", "--host", "10.77.0.1", "--port", "9444")
    refused = consortium.do("coordinator", "start", str(home), "--insecure-for-testing", check=False)
    assert refused.returncode == 2
    assert "without encryption nothing may leave this machine" in refused.stderr
