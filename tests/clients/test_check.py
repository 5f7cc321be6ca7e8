"""`fedmed site check`: each thing that may be wrong is named with what to do, and the dry round leaves no trace."""

import contextlib
import hashlib
import json
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import psutil
import pytest

import clients.check
import clients.check_network
import clients.dry_round
from clients.check import check
from clients.check_network import check_network
from clients.coordinator import CA
from clients.dry_round import dry_round, model_of, task_of
from clients.finding import Finding
from clients.folder import KEY, POLICY, SiteFolder
from clients.policy import Policy
from clients.policy_file import render
from fedmed.errors import ConfigError, DataError, ModelError
from fedmed.model import CnnModelConfig, TabularModelConfig
from fedmed.task import ImageTaskConfig, TableTaskConfig
from tests.clients.planted import PLANTERS, leaks
from tests.clients.sites import make_site, table
from tests.fedmed.flower.network import Network, free_port, write_certificates

ROOT = Path(__file__).parent.parent.parent


def own_table(path: Path, name: str = "a") -> Path:
    """The rows of one site, as it has them itself."""
    lines = table(path).read_text().splitlines()
    path.write_text(
        "\n".join([lines[0], *(line for line in lines[1:] if line.startswith(f"{name},"))]) + "\n"
    )
    return path


@pytest.fixture
def site(tmp_path: Path) -> Path:
    data = str(own_table(tmp_path / "t.csv"))
    return make_site(tmp_path / "a", "a", held_out="none", budget=30, data=data, activations_gb=0.0).path


def change(site: Path, **values: Any) -> None:
    policy = SiteFolder.open(site).policy
    (site / POLICY).write_text(render(Policy.model_validate({**policy.model_dump(), **values})))


@pytest.fixture
def no_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """The dry round has tests of its own."""
    monkeypatch.setattr(clients.check, "_dry_round", lambda _: iter(()))


def found(site: Path, what: str) -> Finding:
    findings = [one for one in check(site) if one.what == what]
    assert len(findings) == 1
    return findings[0]


def everything(folder: Path) -> dict[str, tuple[bytes, float]]:
    return {
        str(path): (path.read_bytes(), path.stat().st_mtime)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_a_site_that_is_ready_gets_only_ok_and_is_left_as_it_was(
    command: Any, site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dry round is the real one, in a process of its own: ledger, caches and home stay, byte by byte."""
    before = everything(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    code, out, err = command("site", "check", site)
    assert (code, err) == (0, ""), out
    lines = out.splitlines()
    assert all(line.startswith("OK  ") for line in lines)
    whats = [line[6:15].strip() for line in lines]
    assert whats == [
        "folder",
        "policy",
        "budget",
        "data",
        "model",
        "memory",
        "disk",
        "network",
        "GPU",
        "dry round",
    ]
    assert "logistic learned 'sick' from 1 columns" in lines[-1]
    assert "nothing was sent or kept" in lines[-1]
    assert everything(tmp_path) == before
    assert "key" not in out or (site / KEY).read_bytes().hex() not in out


def dry_findings(monkeypatch: pytest.MonkeyPatch, **values: Any) -> list[str]:
    """What is said of a dry round whose process prints this."""
    ended = subprocess.CompletedProcess([], 0, stdout=json.dumps(values) + "\n")
    monkeypatch.setattr(clients.check.subprocess, "run", lambda *_, **__: ended)
    return [one.line for one in clients.check._dry_round(Path())]


def test_what_training_used_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    took = {"model": "cnn", "data": "x", "seconds": 1.0, "peak_mb": 2000.0}
    seen = "NVIDIA H200, 140 of 150 GB free"
    gpu, _ = dry_findings(monkeypatch, gpu="", **took)
    assert gpu.endswith("none; training uses the processor")
    gpu, _ = dry_findings(monkeypatch, gpu=seen, **took)
    assert gpu.endswith(f"{seen}; training uses the processor")
    gpu, took_long = dry_findings(monkeypatch, gpu=seen, **took, device="NVIDIA H200", device_peak_mb=500.0)
    assert gpu.endswith(f"{seen}; training uses NVIDIA H200")
    assert "1.0 s, 2.0 GB at most and 0.5 GB of the GPU's; nothing was sent" in took_long
    gpu, failed = dry_findings(monkeypatch, gpu=seen, error="device=cuda:1: PyTorch finds 1")
    assert gpu.endswith(seen)
    assert failed.startswith("TODO")


def test_a_dry_round_goes_where_runs_will(site: Path) -> None:
    change(site, device="cuda:99")
    with pytest.raises(ConfigError, match=r"^device=cuda:99: "):
        dry_round(site)


@pytest.mark.usefixtures("no_round")
def test_as_json(command: Any, site: Path) -> None:
    change(site, tasks=())
    code, out, _ = command("site", "check", site, "--json")
    values = json.loads(out)
    assert (code, values["ok"]) == (1, False)
    assert [one["what"] for one in values["findings"] if not one["ok"]] == ["policy"]


WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "no task": ("policy", {"tasks": ()}, "tasks is empty, so that no run can start"),
    "another cohort": ("budget", {"cohort": "x"}, "no cohort 'x'; fedmed privacy cohort add x"),
    "no data": ("data", {"data": None}, "site.yaml names none"),
    "any data": ("data", {"data": "*"}, "site.yaml names none"),
    "absent data": ("data", {"data": "/nowhere.csv"}, "no such file"),
    "no patient column": ("data", {"patient_column": None}, "patient_column: none in site.yaml"),
    "another patient column": ("data", {"patient_column": "idd"}, "patient_column=idd: not in .*; did you mean 'id'"),
    "model not pulled": ("model", {"models": ({"id": "org/name", "sha256": "0" * 64},)}, "fedmed models pull org/name"),
    "package not installed": ("model", {"models": ({"id": "no_such:x", "sha256": "0" * 64},)}, "is not installed"),
    "cache too large": ("disk", {"activations_gb": 99_999.0}, "activations_gb of site.yaml lets 99999 be filled"),
}  # fmt: skip


@pytest.mark.usefixtures("no_round")
@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named_with_what_to_do(name: str, site: Path) -> None:
    what, values, says = WRONG[name]
    assert found(site, what).ok
    change(site, **values)
    finding = found(site, what)
    assert not finding.ok
    import re

    assert re.search(says, finding.says), finding.says


@pytest.mark.usefixtures("no_round")
def test_a_folder_that_cannot_be_used_is_all_that_is_said(site: Path) -> None:
    site.chmod(0o755)
    assert [one.what for one in check(site)] == ["folder"]
    assert "chmod 700" in next(iter(check(site))).says
    site.chmod(0o700)
    (site / POLICY).write_text("name: a\nmax_stepz: 1\nepsilon_total: big\n")
    assert [one.ok for one in check(site)] == [False, False]


@pytest.mark.usefixtures("no_round")
def test_memory_and_disk_that_are_short_are_said(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = psutil.virtual_memory()._replace(available=10**9)
    monkeypatch.setattr(clients.check.psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(clients.check.shutil, "disk_usage", lambda _: type("U", (), {"free": 10**8})())
    assert not found(site, "memory").ok
    assert not found(site, "disk").ok


@pytest.mark.usefixtures("no_round")
def test_a_listed_model_is_hashed(site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "modules" / "some_weights" / "model"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "model.safetensors").write_bytes(b"weights")
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    digest = hashlib.sha256(b"weights").hexdigest()
    change(site, models=({"id": "some_weights:model", "sha256": digest},))
    assert found(site, "model").says == "some_weights:model: its weights are the listed ones"
    (package / "model.safetensors").write_bytes(b"other weights")
    finding = found(site, "model")
    assert not finding.ok
    assert "and not the listed one" in finding.says


# The dry round.


def test_a_dry_round_trains_on_the_site_s_own_data_by_its_own_key(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the round of a run: the same function, with noise from the system; but no ledger is opened for it."""
    import clients.site
    from fedmed.privacy.ledger import Ledger

    seen: list[Any] = []
    train = clients.site.train

    def spied(*arguments: Any, **options: Any) -> Any:
        seen.append((arguments, options))
        return train(*arguments, **options)

    monkeypatch.setattr(clients.site, "train", spied)
    monkeypatch.setattr(Ledger, "__init__", lambda *_: pytest.fail("a ledger was opened"))
    before = everything(tmp_path)
    took = dry_round(site)
    assert took["model"] == "logistic"
    assert took["seconds"] > 0
    (_, data, _), options = seen[0]
    assert options["plan"].noise_multiplier == 1
    assert 0 < len(data.labels) < 80
    assert len(seen) == 1
    assert everything(tmp_path) == before


@pytest.mark.parametrize("kind", PLANTERS)
def test_what_a_dry_round_prints_holds_no_record(kind: str, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    planted = PLANTERS[kind](tmp_path / "data")
    path = next(text for text in planted.settings if text.startswith("task.path=")).partition("=")[2]
    data = str(Path(path) / "a") if kind == "image" else path
    column = next((t for t in planted.settings if t.startswith("task.patient_column=")), "=").partition("=")[
        2
    ]
    site = make_site(
        tmp_path / "a", "a", held_out="none", budget=30, data=data, patient_column=column or None
    ).path
    ended = subprocess.run(
        [sys.executable, "-P", "-m", "clients.dry_round", str(site)], capture_output=True, timeout=120,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    values = json.loads(ended.stdout)
    assert values["seconds"] > 0, values
    assert ended.stderr == b""
    assert not leaks(ended.stdout, planted.canaries)


def policy(**values: Any) -> Policy:
    return Policy(name="a", **values)


def test_a_task_is_made_of_any_table(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(
        "who,hospital,age,grade\n"
        + "\n".join(f"p{n},a,{20 + n % 50},{'AB'[n % 2]}" for n in range(60))
        + "\n"
    )
    task, site, said = task_of(policy(data=str(path), patient_column="who"))
    assert isinstance(task, TableTaskConfig)
    assert (task.label, task.patient_column, task.declare) == ("grade", "who", "from_data")
    assert said.startswith("'grade' from ")
    assert task.declared_sizes[site] > 10
    path.write_text("who,hospital,note\n" + "\n".join(f"p{n},a,text {n}" for n in range(60)) + "\n")
    with pytest.raises(DataError, match="no column has 2 to 20 values"):
        task_of(policy(data=str(path), patient_column="who"))
    with pytest.raises(DataError, match=r"patient_column=whom: the table has none; did you mean 'who'\?"):
        task_of(policy(data=str(path), patient_column="whom"))
    path.write_text("who,hospital,age,grade\np1,b,3,A\n")
    with pytest.raises(DataError, match="no column names the site 'a', and a run takes the rows that do"):
        task_of(policy(data=str(path), patient_column="who"))
    for nothing in (None, "*"):
        with pytest.raises(DataError, match="names no table or folder"):
            task_of(policy(data=nothing))


def test_a_listed_model_is_taken_that_reads_the_data(
    bert_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = TableTaskConfig(path="t.csv")
    images = ImageTaskConfig(path="folder")
    assert model_of(policy(), tables) == TabularModelConfig()
    assert model_of(policy(scratch_models=("mlp",)), tables) == TabularModelConfig(hidden=16)
    assert model_of(policy(), images) == CnnModelConfig()
    listed = policy(scratch_models=(), models=({"id": "org/bert", "sha256": "0" * 64},))
    with pytest.raises(ModelError, match="no listed model is here that reads such data"):
        model_of(listed, tables)
    place = {"hub": "org/bert", "revision": "0" * 40}
    monkeypatch.setattr(clients.dry_round, "model_folder", lambda _: (bert_folder, place))
    model = model_of(listed, tables)
    assert (model.name, model.kind) == ("org/bert", "text")
    with pytest.raises(ModelError, match="list one of cnn"):
        model_of(listed, images)


@pytest.mark.parametrize(
    ("program", "says"),
    [("import os; os.kill(os.getpid(), 9)", "its process ended with code -9; was memory short?"),
     ("import time; time.sleep(30)", "not done after 1 s"), ("print('{')", "its process ended with code 0")],
)  # fmt: skip
def test_a_dry_round_that_dies_or_hangs_is_said(
    program: str, says: str, site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "fake"
    fake.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{program}"\n')
    fake.chmod(0o700)
    monkeypatch.setattr(clients.check.sys, "executable", str(fake))
    monkeypatch.setattr(clients.check, "DRY_SECONDS", 1 if "sleep" in program else 30)
    findings = list(clients.check._dry_round(site))
    assert [one.ok for one in findings] == [False]
    assert says in findings[0].says


# The network.


@pytest.fixture
def network(tmp_path: Path) -> Iterator[Network]:
    folder = tmp_path / "coordinator"
    folder.mkdir()
    made = Network(folder)
    made.start()
    yield made
    made.end()


def lines_of(site: Path) -> dict[str, tuple[bool, str]]:
    return {one.what: (one.ok, one.says) for one in check_network(SiteFolder.open(site))}


def test_a_coordinator_is_reached_trusted_and_has_admitted_the_site(site: Path, network: Network) -> None:
    change(site, coordinator=network.address)
    (site / CA).write_bytes(network.ca)
    lines = lines_of(site)
    assert list(lines) == ["network", "TLS", "clock", "admitted"]
    # The certificate of the test lives for a day.
    assert lines["TLS"] == (False, lines["TLS"][1])
    assert "the certificate ends in 0 days" in lines["TLS"][1]
    assert lines["clock"] == (True, "agrees with the coordinator's")
    assert lines["admitted"][0] is False
    assert f"fedmed coordinator admit {site / 'a.pub'}" in lines["admitted"][1]
    control = network.control()
    control.register("a", SiteFolder.open(site).public_key)
    assert lines_of(site)["admitted"] == (True, "as 'a', by this site's key")
    # It was online for a moment, and its place is free again.
    assert [node.status for node in control.nodes()] == ["offline"]
    control.close()


@pytest.fixture
def certified(tmp_path: Path) -> Path:
    folder = tmp_path / "certificates"
    folder.mkdir()
    write_certificates(folder, days=400)
    return folder


def answering(certificates: Path, *, ahead: float = 0.0) -> int:
    """A TLS server that answers one request with a time of its own; its port."""
    port = free_port()
    listening = socket.create_server(("127.0.0.1", port))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates / "server.pem", certificates / "server.key")

    def serve() -> None:
        raw, _ = listening.accept()
        # Who finds the certificate wrong hangs up: what the client then says is what the tests look at.
        with (
            listening,
            contextlib.suppress(ssl.SSLError, OSError),
            context.wrap_socket(raw, server_side=True) as secured,
        ):
            secured.recv(1000)
            date = formatdate(time.time() - ahead, usegmt=True)
            secured.sendall(f"HTTP/1.1 200 OK\r\nDate: {date}\r\nContent-Length: 0\r\n\r\n".encode())

    threading.Thread(target=serve, daemon=True).start()
    return port


@pytest.mark.parametrize(("ahead", "ok"), [(0, True), (30, False), (-30, True), (-600, False)])
def test_a_clock_that_is_off_is_said(ahead: float, ok: bool, site: Path, certified: Path) -> None:
    change(site, coordinator=f"127.0.0.1:{answering(certified, ahead=ahead)}")
    (site / CA).write_bytes((certified / "ca.pem").read_bytes())
    lines = lines_of(site)
    assert lines["TLS"][0], lines
    assert "its certificate ends in 399 days" in lines["TLS"][1]
    assert lines["clock"][0] is ok
    if not ok:
        assert "timedatectl set-ntp true" in lines["clock"][1]
        assert ("ahead of" if ahead > 0 else "behind") in lines["clock"][1]


def test_a_certificate_that_is_wrong_or_has_expired_is_said(
    site: Path, certified: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    write_certificates(other, days=-1)
    (site / CA).write_bytes((other / "ca.pem").read_bytes())
    change(site, coordinator=f"127.0.0.1:{answering(certified)}")
    lines = lines_of(site)
    assert list(lines) == ["network", "TLS"]
    assert not lines["TLS"][0]
    assert "ask the coordinator for its ca.pem" in lines["TLS"][1]
    change(site, coordinator=f"127.0.0.1:{answering(other)}")
    assert "the certificate has expired" in lines_of(site)["TLS"][1]


def test_nothing_is_sent_where_nobody_can_be_trusted(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a CA only a coordinator on this machine is asked."""
    change(site, coordinator=f"127.0.0.1:{free_port()}")
    finding = next(iter(check_network(SiteFolder.open(site))))
    assert (finding.ok, "cannot be reached (Connection refused)" in finding.says) == (False, True)
    port = free_port()
    with socket.create_server(("127.0.0.1", port)):
        change(site, coordinator=f"127.0.0.1:{port}")
        monkeypatch.setattr(clients.check_network, "is_loopback", lambda _: False)
        monkeypatch.setattr(clients.check_network, "_admitted", lambda *_: pytest.fail("asked without TLS"))
        lines = lines_of(site)
    assert list(lines) == ["network", "TLS"]
    assert "is missing; ask the coordinator for its ca.pem" in lines["TLS"][1]
