"""A coordinator with a real SuperLink and real sites on loopback: what a person does on a normal day, and a bad one."""

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.strategies.coordinator.hub import SITES, Hub, descendants, slowly
from tests.strategies.coordinator.play_sites import new_site

ROUNDS = 12


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    made = Hub(tmp_path_factory.mktemp("consortium"))
    try:
        made.init()
        # One before the start, one while it runs.
        first, second = (str(made.beside / f"{name}.pub") for name in SITES)
        assert "it holds from the next start on" in made.command("coordinator", "admit", first).out
        made.start()
        assert made.command("coordinator", "admit", second).out == f"site '{SITES[1]}': admitted\n"
        made.sites()
        slowly(lambda: made.online() == list(SITES))
        yield made
    finally:
        made.end()


def history(folder: Path) -> list[int]:
    return [entry["round"] for entry in json.loads((folder / "history.json").read_text())]


def sent(folder: Path) -> list[int]:
    """The rounds that were sent, in order."""
    lines = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
    return [line["round"] for line in lines if line["event"] == "round-sent"]


def test_a_closed_terminal_and_a_new_authority_do_not_end_a_run(hub: Hub) -> None:
    """The one who watches goes; certificates are renewed; sites still hold the ca.pem that they were given."""
    place = hub.launch(f"rounds={ROUNDS}", name="terminal")
    watching = hub.processes[-1]
    slowly(lambda: place.figures().round >= 1)
    watching.send_signal(signal.SIGINT)
    assert watching.wait(60) == 130
    said = (hub.beside / "terminal.log").read_text()
    assert f"look again: fedmed runs show {place.name} --coordinator {hub.path} --follow" in said
    assert f"stop it: fedmed runs stop {place.name}" in said

    rotated = hub.command("coordinator", "rotate", "--ca")
    assert rotated.code == 0, rotated.err
    slowly(lambda: "a new certificate is in use" in (hub.path / "logs" / "coordinator.jsonl").read_text())
    again = hub.command("coordinator", "rotate", "--ca")
    assert "the authority is changing already; first: fedmed coordinator rotate --end-transition" in again.err
    # And the SuperLink dies.
    (superlink,) = (
        process for process in descendants(hub.processes[0]) if "fedmed.flower.superlink" in process.cmdline()
    )
    superlink.kill()
    assert hub.wait_for_end(place) == "finished", place.output.read_text()
    assert history(place.path) == sent(place.path) == list(range(1, ROUNDS + 1))
    assert (
        "superlink ended with code -9; it starts again"
        in (hub.path / "logs" / "coordinator.jsonl").read_text()
    )
    slowly(lambda: hub.online() == list(SITES))

    (row,) = json.loads(hub.command("runs", "--json").out)
    assert (row["state"], row["round"], row["rounds"], row["private"]) == ("finished", ROUNDS, ROUNDS, False)
    assert "NOT PRIVATE" in hub.command("runs", "list").out
    shown = hub.command("runs", "show", place.name[:-2])
    assert f"round  {ROUNDS}/{ROUNDS}" in shown.out
    status = json.loads(hub.command("coordinator", "status", "--json").out)
    assert [site["status"] for site in status["sites"]] == ["online", "online"]
    assert time.time() - status["sites"][0]["last_seen"] < 60
    assert "SuperLink down" in hub.said
    assert f"run '{place.name}': finished, round {ROUNDS}/{ROUNDS}, NOT PRIVATE" in hub.said


def test_everything_killed_goes_on_from_disk_and_what_a_person_stops_does_not(hub: Hub) -> None:
    """All processes of the coordinator at once, with -9, in the middle of a run; no finished round is repeated."""
    place = hub.launch(f"rounds={ROUNDS}", name="killed")
    slowly(lambda: place.figures().round >= 1)
    supervisor = hub.processes[0]
    below = descendants(supervisor)
    # SuperLink and the run's process, at least.
    assert len(below) >= 2
    supervisor.kill()
    supervisor.wait()
    _, alive = psutil.wait_procs(below, timeout=30)
    assert not alive, [process.cmdline() for process in alive]
    assert place.read().state == "running"
    status = hub.status()
    assert (status["running"], status["superlink"]) == (False, "down")
    assert "not running; start it with" in hub.command("coordinator", "status").out
    done = place.figures().round

    hub.processes[0] = hub.start()
    slowly(lambda: place.figures().round > done)
    stopped = hub.command("runs", "stop", place.name)
    assert stopped.out == f"run '{place.name}': stopped\n", stopped.err
    slowly(lambda: f"go on with: fedmed runs resume {place.name}" in (hub.beside / "killed.log").read_text())
    kept = place.figures().round
    assert done < kept < ROUNDS
    resumed = hub.command("runs", "resume", place.name)
    assert resumed.code == 0, resumed.err
    # Only what it prints from now on.
    assert f"resumed after round {kept} of {ROUNDS}" in resumed.out
    assert f"resumed after round {done} of {ROUNDS}" not in resumed.out
    assert history(place.path) == list(range(1, ROUNDS + 1))
    # At most the rounds that were under way are sent again.
    rounds = sent(place.path)
    assert [number for number in rounds if number not in (done + 1, kept + 1)] == [
        number for number in range(1, ROUNDS + 1) if number not in (done + 1, kept + 1)
    ]
    assert len(rounds) <= ROUNDS + 2
    again = hub.command("runs", "resume", place.name)
    assert (again.code, "finished; nothing is left to do" in again.err) == (2, True)


def test_an_expelled_site_is_refused_for_good(hub: Hub) -> None:
    assert hub.command("coordinator", "expel", SITES[1]).out == f"site '{SITES[1]}': expelled\n"
    slowly(lambda: "expelled" in (hub.beside / "sites.log").read_text())
    sites = json.loads(hub.command("coordinator", "status", "--json").out)["sites"]
    assert [(site["name"], site["status"]) for site in sites] == [(SITES[0], "online")]
    readmitted = hub.command("coordinator", "admit", str(hub.beside / f"{SITES[1]}.pub"))
    assert "its key was expelled" in readmitted.err
    # With the key of a new folder it may come back.
    new_site(hub.beside, SITES[1])
    assert hub.command("coordinator", "admit", str(hub.beside / f"{SITES[1]}.pub")).out.endswith("admitted\n")


def test_no_log_holds_a_secret(hub: Hub) -> None:
    """After all that happened above, in whatever form."""
    folder = hub.folder
    logs = b"".join(path.read_bytes() for path in [*folder.logs.iterdir(), *folder.runs.glob("*/output.log")])
    assert len(logs) > 1000
    for line in (folder.logs / "coordinator.jsonl").read_text().splitlines():
        assert {"time", "level", "process", "text"} == set(json.loads(line))
    for secret in (folder.control_secret, folder.executor_secret):
        assert secret.hex().encode() not in logs
        assert repr(secret).encode() not in logs
    keys = [
        line for name in ("authority.pem", "server.pem") for line in (folder.path / name).read_bytes().split()
    ]
    assert len(keys) > 20
    assert not [line for line in keys if len(line) > 30 and line in logs]
    for process in descendants(hub.processes[0]):
        assert folder.control_secret.hex() not in " ".join(process.cmdline())
    mine = [
        folder.logs,
        folder.path,
        folder.path / "superlink.db",
        *folder.logs.iterdir(),
        *folder.runs.glob("*/*.log"),
    ]
    modes = {path.stat().st_mode & 0o077 for path in mine}
    assert modes == {0}


def test_a_second_coordinator_in_the_folder_is_refused(hub: Hub) -> None:
    second = hub.command("coordinator", "start")
    assert second.code == 2
    assert "this coordinator runs already; look at it with" in second.err
    assert second.out == ""
