"""A coordinator's folder is whole or absent, closed to others, and its options are read strictly."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fedmed.errors import ConfigError
from strategies.coordinator.config import ABOUT, CoordinatorConfig, read_config, render
from strategies.coordinator.folder import FILES, SECRETS, CoordinatorError, CoordinatorFolder, local_host

CONFIG = CoordinatorConfig(name="the hub", hosts=["hub.example", "10.1.2.3"])


@pytest.fixture
def folder(tmp_path: Path) -> CoordinatorFolder:
    return CoordinatorFolder.init(tmp_path / "the hub", CONFIG)


def test_a_new_coordinator_is_for_its_owner_alone(folder: CoordinatorFolder) -> None:
    assert sorted(os.listdir(folder.path)) == sorted(FILES)
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
    assert {stat.S_IMODE((folder.path / name).stat().st_mode) for name in FILES} == {0o600}
    assert folder.config == CONFIG
    assert len({folder.control_secret, folder.executor_secret}) == 2
    assert b"PRIVATE" not in folder.trusted
    shown = f"{folder} {folder!r}"
    assert repr(folder.control_secret) not in shown
    assert repr(folder.executor_secret) not in shown


def test_another_start_from_the_same_folder_is_the_same(folder: CoordinatorFolder) -> None:
    again = CoordinatorFolder.open(folder.path)
    assert (again.control_secret, again.executor_secret) == (folder.control_secret, folder.executor_secret)


def test_init_replaces_nothing(folder: CoordinatorFolder, tmp_path: Path) -> None:
    with pytest.raises(
        CoordinatorError, match="holds a coordinator already; start it with: fedmed coordinator"
    ):
        CoordinatorFolder.init(folder.path, CONFIG)
    used = tmp_path / "used"
    used.mkdir()
    (used / "notes").write_text("mine")
    with pytest.raises(CoordinatorError, match="holds other files"):
        CoordinatorFolder.init(used, CONFIG)
    assert os.listdir(used) == ["notes"]


def test_an_interrupted_init_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced, failed = os.fsync, 0
    for at in range(1, 30):
        calls = 0

        def fsync(handle: int, at: int = at) -> None:
            nonlocal calls
            calls += 1
            if calls == at:
                raise OSError(28, "No space left on device")
            synced(handle)

        monkeypatch.setattr(os, "fsync", fsync)
        try:
            CoordinatorFolder.init(tmp_path / "hub", CONFIG)
            break
        except CoordinatorError as error:
            failed += "No space left" in str(error) and os.listdir(tmp_path) == []
    # Each file and both folders.
    assert failed == len(FILES) + 2


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(name: str, folder: CoordinatorFolder) -> None:
    (folder.path / name).unlink()
    with pytest.raises(CoordinatorError, match=f"damaged, without {name}; restore it from a backup"):
        CoordinatorFolder.open(folder.path)


@pytest.mark.parametrize("name", SECRETS)
def test_an_open_secret_is_refused_until_the_command_is_run(name: str, folder: CoordinatorFolder) -> None:
    (folder.path / name).chmod(0o640)
    with pytest.raises(CoordinatorError, match="others may read or change it; run: chmod 600") as refused:
        CoordinatorFolder.open(folder.path)
    assert os.system(str(refused.value).partition("run: ")[2]) == 0
    CoordinatorFolder.open(folder.path)


def test_without_one_it_is_said_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(
        CoordinatorError, match=r"no coordinator there; make one with: fedmed coordinator init .*--host"
    ):
        CoordinatorFolder.open(tmp_path)


def test_every_option_stands_in_the_file_with_what_it_means(folder: CoordinatorFolder) -> None:
    text = (folder.path / "coordinator.yaml").read_text()
    assert set(yaml.safe_load(text)) == set(ABOUT)
    assert yaml.safe_load(text)["hosts"] == CONFIG.hosts
    assert text.count("# ") >= len(ABOUT)
    odd = CoordinatorConfig(name="yes: # 'a' \"b\" ü", hosts=["::1"], port=1)
    (folder.path / "coordinator.yaml").write_text(render(odd))
    assert read_config(folder.path / "coordinator.yaml") == odd


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("ports: 1", "ports: unknown key; did you mean 'port'"), ("port: '1'", "port='1': expected a whole number"),
        ("port: 0", "port=0: expected 1 to 65535"), ("port: 5000", "mlflow_port=5000: expected another number"),
        ("port: 1\nport: 2", "a key stands twice"), ("listen: everywhere at once", "expected an IP address"),
        ("mlflow: 1", "mlflow=1: expected true or false"), ("runs_at_once: 0", "expected >= 1"), ("[", "not YAML"),
    ],
)  # fmt: skip
def test_a_wrong_option_is_one_line(line: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "coordinator.yaml"
    path.write_text(f"name: a\nhosts: [b]\n{line}\n")
    with pytest.raises(ConfigError) as refused:
        read_config(path)
    assert str(refused.value).startswith(f"{path}: ")
    assert expected in str(refused.value)
    assert "\n" not in str(refused.value)


def test_missing_options_are_named(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("name: a")
    with pytest.raises(ConfigError, match="hosts: missing"):
        read_config(tmp_path / "a")
    (tmp_path / "a").write_text("- a")
    with pytest.raises(ConfigError, match="expected lines of KEY: VALUE"):
        read_config(tmp_path / "a")


def test_this_machine_reaches_itself() -> None:
    hosts = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "10.1.2.3": "10.1.2.3", "fe80::1": "[fe80::1]"}
    assert {listen: local_host(listen) for listen in hosts} == hosts


def test_a_renewal_that_is_killed_can_be_done_again(
    folder: CoordinatorFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    import strategies.coordinator.folder as module

    write, before = module.write_bytes, folder.trusted

    def dies(path: Path, content: bytes) -> None:
        if path.name == "server.pem":
            raise KeyboardInterrupt
        write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_bytes", dies)
        with pytest.raises(KeyboardInterrupt):
            folder.renew(folder.authority().successor("hub"))
    # What the server shows is still signed by an authority that sites trust, old file or new.
    assert folder.trusted.endswith(before)
    assert folder.authority().former is not None
    folder.renew(folder.authority())
    assert stat.S_IMODE((folder.path / "server.pem").stat().st_mode) == 0o600
    assert (folder.path / "server.pem").read_bytes().count(b"BEGIN CERTIFICATE") == 2


def test_one_process_runs_a_coordinator(folder: CoordinatorFolder) -> None:
    assert folder.running() is None
    with folder.alone():
        folder.say_running(pid=1)
        assert folder.running() == {"pid": 1}
        program = (
            "import sys; from pathlib import Path; from strategies.coordinator.folder import *\n"
            "with CoordinatorFolder.open(Path(sys.argv[1])).alone(): pass"
        )
        other = subprocess.run(
            [sys.executable, "-c", program, str(folder.path)], capture_output=True, text=True, check=False
        )
        assert "this coordinator runs already; look at it with: fedmed coordinator status" in other.stderr
    assert folder.running() is None
