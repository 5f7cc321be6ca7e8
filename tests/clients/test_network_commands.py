"""`fedmed site` for a site in a consortium: init, status, pause, service, requests, and the health endpoint."""

import dataclasses
import http.client
import json
import logging
import os
import shutil
import socket
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from clients.coordinator import CA, INSECURE, admission_name, is_loopback, trusted
from clients.folder import FILES, SiteFolder
from clients.health import Health, served
from clients.logs import JsonLines
from clients.pause import is_paused
from clients.service import unit
from clients.start import PLACE, locked
from clients.status import is_well, status
from fedmed.errors import ConfigError
from tests.clients.sites import (
    PRIVATE_METRICS,
    account,
    change_policy,
    instruction,
    ledger_of,
    make_site,
    quoted,
    settings,
    table,
)
from tests.fedmed.flower.network import write_certificates


@pytest.fixture
def authority(tmp_path: Path) -> Path:
    folder = tmp_path / "coordinator"
    folder.mkdir()
    write_certificates(folder)
    return folder


def test_a_site_of_a_consortium_gets_its_ca_and_what_admits_it(
    command: Any, tmp_path: Path, authority: Path
) -> None:
    folder = tmp_path / "site"
    code, out, err = command(
        "site", "init", folder, "--name", "St. Mary's / West", "--coordinator", "fl.example.org:9092",
        "--ca", authority / "ca.pem",
    )  # fmt: skip
    assert (code, out) == (0, f"site 'St. Mary's / West': {folder}\n")
    public = folder / "St.-Mary-s-West.pub"
    assert err.splitlines()[1] == f"next: send {public} to the coordinator, who admits the site by it"
    assert sorted(os.listdir(folder)) == sorted([*FILES, CA, public.name])
    assert {stat.S_IMODE((folder / name).stat().st_mode) for name in os.listdir(folder)} == {0o600}
    site = SiteFolder.open(folder)
    assert site.policy.coordinator == "fl.example.org:9092"
    assert (folder / CA).read_bytes() == (authority / "ca.pem").read_bytes()
    first, _, pem = public.read_bytes().partition(b"\n")
    assert first == b"# fedmed site: St. Mary's / West"
    assert pem == site.public_key
    # A reader of PEM takes the file as it is.
    assert serialization.load_pem_public_key(public.read_bytes())
    assert b"PRIVATE" not in public.read_bytes()


def test_without_a_coordinator_a_site_is_as_before(command: Any, tmp_path: Path) -> None:
    code, _, err = command("site", "init", tmp_path / "site", "--name", "a")
    assert (code, err.count("\n")) == (0, 1)
    assert sorted(os.listdir(tmp_path / "site")) == sorted(FILES)
    assert SiteFolder.open(tmp_path / "site").policy.coordinator is None


@pytest.mark.parametrize(
    ("name", "file"),
    [("../../etc/x", "etc-x.pub"), (".", "site.pub"), ("Zürich", "Zürich.pub"), ("VA Long Beach", "VA-Long-Beach.pub"),
     ("€" * 100, "site.pub"), ("x" * 100, "x" * 60 + ".pub"), ("-rf", "rf.pub")],
)  # fmt: skip
def test_the_file_s_name_is_safe(name: str, file: str) -> None:
    assert admission_name(name) == file
    assert len(file.encode()) < 255


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--coordinator", "fl.example.org:9092"], "--ca: missing beside --coordinator fl.example.org:9092"),
        (["--ca", "ca.pem"], "expected beside it --coordinator HOST:PORT"),
        (["--coordinator", "fl.example.org"], "expected HOST:PORT"),
        (["--coordinator", "fl.example.org:99999"], "the port from 1 to 65535"),
        (["--coordinator", "a b:1", "--ca", "ca.pem"], "expected HOST:PORT, e.g."),
        (["--coordinator", "fl.example.org:9092", "--ca", "server.key"], "holds a private key"),
        (
            ["--coordinator", "fl.example.org:9092", "--ca", "text"],
            "expected the coordinator's certificate authority",
        ),
        (
            ["--coordinator", "fl.example.org:9092", "--ca", "nowhere"],
            "cannot be read (No such file or directory)",
        ),
    ],
)
def test_what_cannot_be_a_coordinator_makes_no_site(
    arguments: list[str], says: str, command: Any, tmp_path: Path, authority: Path
) -> None:
    (authority / "text").write_text("no certificate")
    files = ("ca.pem", "server.key", "text", "nowhere")
    given = [str(authority / word) if word in files else word for word in arguments]
    code, out, err = command("site", "init", tmp_path / "site", "--name", "a", *given)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert says in err
    assert not (tmp_path / "site").exists()


@pytest.mark.parametrize(
    ("address", "here"),
    [("127.0.0.1:1", True), ("127.9.9.9:1", True), ("[::1]:1", True), ("localhost:1", True), ("10.0.0.1:1", False),
     ("localhost.example.org:1", False), ("0.0.0.0:1", False), ("fl.example.org:1", False)],
)  # fmt: skip
def test_insecure_traffic_stays_on_this_machine(address: str, here: bool, tmp_path: Path) -> None:
    assert is_loopback(address) is here
    if here:
        assert trusted(tmp_path, address, insecure=True) == (address, None)
    else:
        with pytest.raises(ConfigError, match=f"expected a loopback address, .* with {INSECURE}"):
            trusted(tmp_path, address, insecure=True)


def test_nothing_is_trusted_without_a_certificate_authority(tmp_path: Path, authority: Path) -> None:
    with pytest.raises(ConfigError, match=r"coordinator=null: expected HOST:PORT in .*site.yaml"):
        trusted(tmp_path, None, insecure=False)
    # Loopback is no exception: who asked for TLS gets TLS.
    with pytest.raises(ConfigError, match=r"ca.pem: missing; ask the coordinator"):
        trusted(tmp_path, "127.0.0.1:1", insecure=False)
    (tmp_path / CA).write_bytes((authority / "ca.pem").read_bytes())
    address, ca = trusted(tmp_path, "fl.example.org:9092", insecure=False)
    assert address == "fl.example.org:9092"
    assert ca is not None
    assert x509.load_pem_x509_certificates(ca)


def test_start_says_in_one_line_what_is_missing(command: Any, tmp_path: Path) -> None:
    folder = SiteFolder.init(tmp_path / "a", name="a").path
    code, out, err = command("site", "start", folder)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "coordinator=null" in err


def test_insecure_mode_is_for_this_machine(command: Any, tmp_path: Path, authority: Path) -> None:
    """A coordinator on loopback needs no certificates; one elsewhere is not served without, whatever is asked for."""
    near, far = tmp_path / "near", tmp_path / "far"
    assert command("site", "init", near, "--name", "a", "--coordinator", "127.0.0.1:1")[0] == 0
    assert not (near / CA).exists()
    code, _, err = command("site", "start", near)
    assert (code, "ca.pem: missing" in err) == (2, True)
    ca = authority / "ca.pem"
    assert command("site", "init", far, "--name", "a", "--coordinator", "10.0.0.1:1", "--ca", ca)[0] == 0
    code, out, err = command("site", "start", far, INSECURE)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"coordinator=10.0.0.1:1: expected a loopback address, e.g. 127.0.0.1:9092, with {INSECURE}" in err
    assert not (far / PLACE).exists()


# Health and status.


def health(folder: Path) -> Health:
    return Health("a", folder, "fl.example.org:9092")


def get(port: int, path: str = "/health", host: str | None = None) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    connection.request("GET", path, headers={"Host": host} if host else {})
    answer = connection.getresponse()
    found = answer.status, answer.read()
    connection.close()
    return found


def test_health_is_told_on_loopback_alone(tmp_path: Path) -> None:
    known = health(tmp_path)
    with served(known.values, None) as port:
        code, body = get(port)
        assert code == 200
        assert json.loads(body)["state"] == "connecting"
        known.now("online")
        (tmp_path / "paused").touch()
        found = json.loads(get(port)[1])
        assert (found["state"], found["paused"], found["site"]) == ("online", True, "a")
        assert get(port, "/")[0] == 404
        # A page in a browser reaches it by a name of its own.
        assert get(port, host="evil.example.org")[0] == 404
        with pytest.raises(
            ConfigError, match=f"health_port={port}: Address already in use; expected a free port"
        ):
            served(known.values, port).__enter__()
        with socket.socket() as outside, pytest.raises(OSError, match="refused"):
            outside.connect(("127.0.0.2", port))
    with pytest.raises(ConnectionRefusedError):
        get(port)
    with served(known.values, 0) as none:
        assert none == 0


def test_status_asks_the_daemon_or_says_what_to_do(command: Any, tmp_path: Path) -> None:
    folder = SiteFolder.init(tmp_path / "a", name="a").path
    code, out, _ = command("site", "status", folder)
    assert code == 1
    assert out.splitlines() == [f"{folder}: stopped", f"next: start it: fedmed site start {folder}"]
    # What a killed daemon left behind is not believed.
    (folder / PLACE).write_text(json.dumps({"pid": 1, "health": 1}))
    assert status(folder)["state"] == "stopped"
    with locked(folder):
        (folder / PLACE).write_text("{")
        assert command("site", "status", folder)[1].startswith(f"{folder}: silent\nnext: a daemon runs and")
        known = health(folder)
        with served(known.values, None) as port:
            (folder / PLACE).write_text(json.dumps({"pid": 1, "health": port}))
            known.now("refused", "fl.example.org:9092: refuses us: unknown-node", "unknown-node")
            code, out, _ = command("site", "status", folder)
            assert code == 1
            lines = out.splitlines()
            assert lines[0] == "site 'a' at fl.example.org:9092: refused"
            assert lines[2] == "  last contact: never"
            assert lines[-1].startswith(
                "next: ask the coordinator to admit the site: fedmed coordinator admit"
            )
            known.now("online")
            known.last_contact, known.run, known.round = known.since, "x\x1b[2J\nsite 'b'", 3
            code, out, _ = command("site", "status", folder)
            assert code == 0
            assert "\x1b" not in out
            assert "  last run: 'x [2J site 'b'', round 3" in out.splitlines()
            code, out, _ = command("site", "status", folder, "--json")
            assert (code, json.loads(out)["round"]) == (0, 3)
            assert is_well(json.loads(out))


def test_pause_and_resume(command: Any, tmp_path: Path) -> None:
    folder = SiteFolder.init(tmp_path / "a", name="a").path
    code, out, _ = command("site", "pause", folder)
    assert (code, out) == (0, "site 'a': paused: new runs are refused, those under way go on\n")
    assert is_paused(folder)
    assert "paused, new runs are refused; take them again" in command("site", "status", folder)[1]
    assert command("site", "pause", folder, "--resume")[:2] == (0, "site 'a': takes new runs\n")
    assert not is_paused(folder)
    assert command("site", "pause", folder, "--resume")[0] == 0


@pytest.mark.parametrize("name", ["site", 'a "b" $HOME %h \\x'])
def test_the_unit_is_one_that_systemd_takes(name: str, command: Any, tmp_path: Path) -> None:
    folder = SiteFolder.init(tmp_path / name, name="St. 50% Mary's").path
    code, out, _ = command("site", "service", folder)
    assert code == 0
    assert "site start" in out
    options = dict(
        line.split("=", 1) for line in out.splitlines() if "=" in line and not line.startswith("#")
    )
    assert options["ProtectSystem"] == "strict"
    assert options["NoNewPrivileges"] == "yes"
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        return
    # A shell in the place of a command that this machine may not have.
    text = unit(
        folder, name="St. 50% Mary's", user="root", command=Path("/bin/sh"), home=tmp_path, directory=tmp_path
    )
    place = tmp_path / "fedmed-site-x.service"
    place.write_text(text)
    said = subprocess.run([analyze, "verify", str(place)], capture_output=True, text=True, timeout=60)
    assert str(place.name) not in said.stderr, said.stderr
    # The check sees what it should.
    place.write_text(text.replace("[Service]", "[Service]\nProtectSistem=strict"))
    said = subprocess.run([analyze, "verify", str(place)], capture_output=True, text=True, timeout=60)
    assert "ProtectSistem" in said.stderr


def test_the_log_is_json_and_holds_no_text_of_an_exception() -> None:
    record = logging.LogRecord("fedmed.site", logging.ERROR, "f", 1, "line one\nline %s", ("two",), None)
    try:
        raise ValueError("patient 4711")
    except ValueError as error:
        record.exc_info = (type(error), error, error.__traceback__)
    line = JsonLines().format(record)
    assert "\n" not in line
    values = json.loads(line)
    assert values["message"] == "line one\nline two"
    assert values["error"].startswith("internal: ValueError at ")
    assert "4711" not in line


# Requests.


def test_a_request_says_who_asks_for_what_and_what_it_would_leave(command: Any, tmp_path: Path) -> None:
    folder = make_site(tmp_path / "a", "a", held_out="private", budget=60, needs_approval=True).path
    change = {"data": "*", "patient_column": "id", "tasks": ("a small table",), "reply_grid_seconds": 0.0,
              "epsilon_per_run": 15.0, "epsilon_total": 90.0, "metrics": {"held_out": "private"}}  # fmt: skip
    change_policy(folder, **change, coordinator="fl.example.org:9092")
    asked = instruction(settings(table(tmp_path / "t.csv"), *PRIVATE_METRICS), run_id="run-1")
    assert quoted(folder, asked).waiting
    code, out, _ = command("site", "requests", folder, "--json")
    assert code == 0
    found = json.loads(out)["run-1"]
    assert found["coordinator"] == "fl.example.org:9092"
    assert found["task_digest"].startswith("sha256:")
    assert found["model_sha256"] is None
    assert len(found["releases"]) == 3
    before, after = found["forecast"]["left_before"], found["forecast"]["left_after"]
    assert found["forecast"]["budget"] == before == 60
    text = command("site", "requests", folder)[1]
    assert f"of it {before:.2f} left before, {after:.2f} after" in text
    for words in ("run-1: waiting", "asked by    fl.example.org:9092", found["task_digest"], found["digest"],
                  "one noisy histogram", "2 updates of the head adapter: with noise"):  # fmt: skip
        assert words in text
    assert command("site", "approve", folder, "run-1")[0] == 0
    assert quoted(folder, asked).waiting is None
    # The forecast is what the ledger then shows: before it, nothing was charged.
    cohort = account(folder).cohort("default")
    assert cohort.budget is not None
    assert cohort.budget.epsilon - cohort.budget.spent(cohort.charges) == pytest.approx(after, abs=1e-9)
    assert json.loads(command("site", "requests", folder, "--json")[1])["run-1"]["forecast"] is None


def test_a_request_that_does_not_fit_says_so(command: Any, tmp_path: Path) -> None:
    folder = make_site(tmp_path / "a", "a", held_out="none", budget=2, needs_approval=True).path
    assert quoted(folder, instruction(settings(table(tmp_path / "t.csv")))).waiting
    assert "it does not fit, and will be refused" in command("site", "requests", folder)[1]


def test_a_request_of_an_older_version_is_still_shown(command: Any, tmp_path: Path) -> None:
    folder = make_site(tmp_path / "a", "a", held_out="none", budget=2).path
    with ledger_of(folder) as ledger:
        ledger.request("old", what={
            "task": "t", "model": "logistic", "adapter": "head", "rounds": 2, "epsilon": 1.0, "delta": 1e-5,
            "not_private": None, "metrics": "none", "digest": "0" * 64})  # fmt: skip
    code, out, _ = command("site", "requests", folder)
    assert code == 0
    assert out.splitlines()[0] == "old: waiting"


def test_an_approval_is_of_the_list_of_releases_that_was_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A version of fedmed that would have more leave the site for the same settings asks again."""
    import clients.request

    folder = make_site(tmp_path / "a", "a", held_out="none", budget=30, needs_approval=True).path
    asked = instruction(settings(table(tmp_path / "t.csv")))
    quoted(folder, asked)
    with ledger_of(folder) as ledger:
        ledger.decide("r", approved=True, by="Ada", why="vote", what=ledger.account.requests["r"])
    assert quoted(folder, asked).waiting is None
    before = clients.request.released
    monkeypatch.setattr(clients.request, "released", lambda *a: [*before(*a), "the gradient norms"])
    assert quoted(folder, dataclasses.replace(asked)).waiting
