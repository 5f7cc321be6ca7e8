"""The command as a person meets it: one line for what is wrong, an exit code, no traceback; help at once."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.commands import FAST, ROOT, Commands, heavy, light, wait_for
from tests.evidence import figure, some
from tests.timing import best

MAIN = "from fedmed.cli.main import main; main()"


@pytest.fixture(scope="module", name="light")
def light_commands() -> Commands:
    """Commands in a process that has not imported torch."""
    return light()


@pytest.fixture(scope="module", name="heavy")
def heavy_commands() -> Commands:
    """Commands in a process that has imported all that a run needs."""
    return heavy()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the wrong inputs below name."""
    path = tmp_path_factory.mktemp("inputs")
    (path / "file.txt").write_text("a file\n")
    (path / "table.csv").write_text("id,ward,outcome,age\n1,A,0,50\n2,B,1,60\n")
    (path / "full").mkdir()
    (path / "full" / "scan.dcm").write_text("")
    for name, text in (("truncated", '{"task": {'), ("unknown", '{"tusk": 1}')):
        (path / name).mkdir()
        (path / name / "config.json").write_text(text)
    for name, files in (
        ("pickle", {"config.json": "{}", "pytorch_model.bin": ""}),
        ("other", {"config.json": "{}", "model.safetensors": "", "vocab.txt": ""}),
        ("image", {"config.json": '{"model_type": "vit"}', "model.safetensors": "", "preprocessor_config.json": "{}"}),
    ):  # fmt: skip
        (path / name).mkdir()
        for file, text in files.items():
            (path / name / file).write_text(text)
    return path


ZEROS = "0" * 64
EMPTY = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
# What was typed, and what the one line must say besides naming it.
WRONG: list[tuple[str, str]] = [
    # Groups, options, keys.
    ("taks=heart", "no setting 'taks'; did you mean 'task'?"),
    ("task=hearts", "no such task; did you mean 'heart'?"),
    ("task=Heart10", "did you mean 'heart10'?"),
    ("model=minlm", "did you mean 'minilm'?"),
    ("experiment=dmeo", "no such experiment; did you mean 'demo'?"),
    ("strategy=avg", "did you mean 'fedavg'?"),
    ("task=_table", "no such task; valid: csv, "),
    ("task=../config", "no such task"),
    ("task=[heart,heart10]", "no such task"),
    ("privacy={epsilon:1}", "no such privacy; valid: dp, off"),
    ("task=", "no such task; valid: "),
    ("model=null", "model=null: no such model; valid: "),
    ("privacy.epsilo=1", "did you mean 'privacy.epsilon'?"),
    ("epsilon=1", "did you mean 'privacy.epsilon'?"),
    ("learning_rate=1", "did you mean 'training.learning_rate'?"),
    ("tasks.path=x", "did you mean 'task.path'?"),
    ("task.columns.age.lwo=3", "task.columns.age.lwo: unknown key; did you mean 'low'?"),
    ("task.columns.agee.low=3", "did you mean 'task.columns.age.low'?"),
    ("task.kind=foo", "task.kind=foo: expected table"),
    ("model.kind=tabular", "model.kind=tabular: expected text"),
    # Grammar.
    ("rounds", "expected key=value"),
    ("", "'': expected key=value"),
    ("=3", "expected key=value"),
    ("rounds=[1", "the value cannot be read"),
    ("name={", "the value cannot be read"),
    ('name="abc', "the value cannot be read"),
    ("name=é", "the value cannot be read; as text, in a shell: 'name=\"é\"'"),
    ("é=1", "expected key=value"),
    ("name=a\nb", "as text, in a shell: 'name=\"a b\"'"),
    ("~rounds", "a setting cannot be deleted; set it instead, e.g. rounds=…"),
    ("~privacy.epsilon=3", "set it instead, e.g. privacy.epsilon=…"),
    ("~task", "set it instead, e.g. task=…"),
    ("+new=1", "no setting 'new'"),
    ("++new=1", "no setting 'new'"),
    ("+privacy.new=1", "no setting 'privacy.new'"),
    ("task@pkg=heart", "no package can be chosen; expected task=…"),
    ("model@a:b=logistic", "expected key=value"),
    ("name=${x}", "name: Interpolation key 'x' not found"),
    ("rounds=${name}", "rounds"),
    ("rounds=???", "expected a whole number"),
    ("hydra.run.dir=x", "no setting 'hydra.run.dir'"),
    ("hydra/launcher=basic", "no setting 'hydra/launcher'"),
    ("hydra=default", "no setting 'hydra'"),
    # Types and null.
    ("rounds=abc", "expected a whole number"),
    ("rounds=2.5", "expected a whole number"),
    ("rounds=true", "expected a whole number"),
    ("rounds=null", "expected a whole number"),
    ("privacy.epsilon=abc", "expected a number or null"),
    ("privacy.epsilon=true", "expected a number or null"),
    ("training.momentum=null", "expected a number"),
    ("reference=3", "expected true or false"),
    ("reference=maybe", "expected true or false"),
    ("name=[a]", "expected text"),
    ("name=null", "expected text"),
    ("task.positive=5", "expected a list"),
    ("adapter.targets=[a,[b]]", "expected text"),
    ("task.declared_sizes=[1]", "expected a mapping"),
    ("task.declared_sizes.Cleveland=x", "expected a whole number"),
    ("task.columns=[1]", "expected a mapping"),
    ("task.columns.age=3", "expected the keys of a column"),
    ("training={rounds:3}", "expected its settings one by one"),
    ("training=null", "expected its settings one by one"),
    # Ranges, and settings that do not go together.
    ("rounds=0", "expected >= 1"),
    ("rounds=99999999999999999999", "expected at most 1000000"),
    ("seed=-1", "expected 0 <= seed"),
    ("privacy.epsilon=-1", "expected > 0"),
    ("privacy.epsilon=nan", "expected a finite number"),
    ("privacy.epsilon=1e9", "expected > 0, from 0.001 to 100"),
    ("privacy.epsilon=0.001 rounds=1000000", "no noise multiplier between"),
    ("training.sample_rate=1e-9 rounds=1", "no noise multiplier between"),
    ("training.learning_rate=inf", "expected a finite number"),
    ("adapter=lora model=logistic", "expected head or full: a tabular model has no transformer blocks"),
    ("strategy.average_last=30 rounds=20", "expected at most rounds=20"),
    ("privacy.noise_multiplier=2", "expected exactly one of the two"),
    ("privacy.epsilon=null", "expected exactly one of the two"),
    ("task.columns.age.low=99", "task.columns.age.low/high=(99.0, 80.0): expected low < high"),
    ("task.declared_sizes.Switzerland=5", "site 'Switzerland' declares 3 training patients; privacy.min_declared"),
    # Missing, and what is not on this machine.
    ("task=csv", "task.path=null: expected a CSV file"),
    ("task=csv task.path=none.csv", "no such file"),
    ("task=csv task.path=table.csv task.site_column=wrad", "no such column; did you mean 'ward'?"),
    ("model=hf", "model.path=null: expected the folder of a Hugging Face encoder"),
    ("model=hf model.path=none", "compute them with: sha256sum none/model.safetensors"),
    (f"model=hf model.path=none model.sha256={ZEROS}", "model.path=none: no such folder"),
    (f"model=hf model.path=pickle model.sha256={ZEROS}", "pytorch_model.bin is not read: convert it to safetensors"),
    (f"model=hf model.path=other model.sha256={ZEROS}", f"model.safetensors has {EMPTY}"),
    (f"model=hf model.path=image model.sha256={EMPTY}", "no tokenizer in it; a 'vit' model does not read text"),
    ("model.package=none:model", "'none' is not installed"),
    ("model.package=none.of.these:model", "expected PACKAGE:FOLDER"),
    ("tracking.uri=http://127.0.0.1:9", "cannot be reached"),
    # Folders.
    ("run_dir=", "run_dir='': expected a folder"),
    ("run_dir=file.txt", "file.txt is no folder that can be written to"),
    ("run_dir=file.txt/new", "file.txt is no folder that can be written to"),
    ("run_dir=truncated", "holds a run already; continue it with: fedmed run resume=truncated"),
    ("run_dir=full", "run_dir=full: holds other files; expected a new or an empty folder"),
    (f"run_dir={'a' * 300}", "cannot be used (File name too long)"),
    ("resume=none", "no config.json in it"),
    ("resume=none seed=1", "no config.json in it"),
    ("resume=", "no config.json in it"),
    ("resume=truncated", "its config.json is damaged"),
    ("resume=unknown", "configuration without task"),
    # Lists of values.
    ("seed=1,2", "2 runs described by a list of values; sweep over them with: fedmed run -m"),
    ("model=logistic,mlp rounds=choice(1,2)", "4 runs described"),
    ("-m seed=0,x", "'seed=x': expected a whole number"),
    ("-m model=logistic,nosuch", "no such model"),
    ("-m privacy.epsilon=1,-3", "privacy.epsilon=-3.0: expected > 0"),
    ("-m adapter=lora,head model=logistic", "adapter=lora: expected head or full"),
    ("-m seed=0,1 run_dir=here", "'run_dir=here': not in a sweep"),
    ("-m resume=a,b", "'resume=a,b': not in a sweep"),
    ("-m task=heart,csv", "expected a CSV file"),
    # Options of the command itself.
    ("--rounds 3", "No such option '--rounds'. See: fedmed run --help"),
    ("-x", "No such option '-x'."),
]  # fmt: skip


def arguments(typed: str) -> list[str]:
    """As a shell would split it; the empty setting and the one with a line break are one argument."""
    return typed.split(" ") if "\n" not in typed else [typed]


@pytest.mark.parametrize(("typed", "says"), some(WRONG, 4), ids=lambda text: text[:60] or "empty")
def test_a_wrong_input_is_one_line_before_torch_loads(
    typed: str, says: str, light: Commands, folder: Path
) -> None:
    before = sorted(folder.rglob("*"))
    ended = light("run", *arguments(typed), cwd=folder)
    assert re.fullmatch(r"error: [^\n]+\n", ended.err), ended.err
    assert says in ended.err
    assert (ended.code, ended.out, ended.torch) == (2, "", False)
    assert sorted(folder.rglob("*")) == before


def test_the_table_is_long() -> None:
    assert len(WRONG) >= 100
    assert len({typed for typed, _ in WRONG}) == len(WRONG)


def test_a_very_long_value_is_a_line_one_can_read(light: Commands, folder: Path) -> None:
    for typed in (
        "rounds=" + "9" * 5000,
        "a" * 100_000 + "=1",
        "name=" + "a" * 100_000,
        "rounds=[" + "1," * 50_000,
    ):
        ended = light("run", typed, cwd=folder)
        assert (ended.code, ended.err.count("\n")) == (2, 1)
        assert len(ended.err) < 1100
        assert "Traceback" not in ended.err


@pytest.mark.parametrize(
    "typed",
    ["nosuch", "--nosuch", "plan --jsn", "task nosuch", "task describe", "run -q a", "privacy nosuch"],
)
def test_a_wrong_command_is_one_line_too(typed: str, light: Commands) -> None:
    ended = light(*typed.split())
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert ended.err.endswith("--help\n")


def test_no_command_shows_the_help(light: Commands) -> None:
    for typed in ([], ["task"], ["privacy"]):
        ended = light(*typed)
        assert ended.code == 2
        assert "Usage: fedmed" in ended.err + ended.out
        assert "Traceback" not in ended.err


def test_mlflow_that_is_not_installed_is_said_before_torch_loads(light: Commands, folder: Path) -> None:
    missing = (
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'mlflow' else find(name, *rest)"
    )
    ended = light("run", "model=logistic", before=missing, cwd=folder)
    assert ended.err.count("\n") == 1
    assert "pip install 'fedmed[coordinator]', or set tracking=none" in ended.err
    assert (ended.code, ended.torch) == (2, False)


def test_a_wrong_input_in_a_process_of_its_own_loads_no_torch(folder: Path) -> None:
    """The same, without the forks of this file: the whole of what a person starts."""
    probe = (
        "import sys, atexit; atexit.register(lambda: print([m for m in ('torch', 'transformers', 'mlflow', 'flwr') "
        f"if m in sys.modules])); {MAIN}"
    )
    ended = subprocess.run(
        [sys.executable, "-c", probe, "run", "task=heart10", "model=logistic", "strategy=fedadm"],
        capture_output=True, text=True, cwd=folder, env=environment(),
    )  # fmt: skip
    assert ended.stderr == "error: strategy=fedadm: no such strategy; did you mean 'fedadam'?\n"
    assert (ended.returncode, ended.stdout) == (2, "[]\n")


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT)}


HELP_SECONDS = 0.5


def test_help_comes_at_once_and_imports_nothing_heavy() -> None:
    probe = (
        "import sys, atexit; atexit.register(lambda: print(sorted({'torch', 'mlflow', 'pandas', 'hydra', 'omegaconf', "
        "'transformers', 'flwr', 'numpy', 'matplotlib', 'opacus', 'pydantic', 'cryptography', 'pydicom', "
        "'PIL'} & set(sys.modules)), "
        f"file=sys.stderr)); {MAIN}"
    )

    def ask() -> None:
        ended = subprocess.run(
            [sys.executable, "-c", probe, "--help"], capture_output=True, text=True, env=environment()
        )
        assert (ended.returncode, ended.stderr) == (0, "[]\n")
        assert "fedmed run experiment=demo" in ended.stdout

    seconds = best(ask, enough=HELP_SECONDS)
    assert seconds <= HELP_SECONDS
    figure("CPU seconds of --help", f"{seconds:.2f}")


@pytest.mark.parametrize(
    "command",
    [
        "",
        "run",
        "plan",
        "task",
        "task describe",
        "task from-npz",
        "task phantoms",
        "privacy",
        "privacy audit",
        "privacy sweep",
    ],
)
def test_every_help_has_examples(command: str, light: Commands) -> None:
    ended = light(*command.split(), "--help")
    assert (ended.code, ended.err) == (0, "")
    assert re.search(rf"^ +fedmed {command}", ended.out.split("Examples:")[1], re.MULTILINE)


def test_every_example_of_the_help_composes(light: Commands) -> None:
    """An example that does not work is worse than none."""
    texts = light("run", "--help").out + light("plan", "--help").out
    examples = re.findall(r"^ +fedmed (?:run|plan) ?(.*?)(?:  +.*)?$", texts, re.MULTILINE)
    assert len(examples) >= 8
    from fedmed.compose import compose_sweep

    for example in examples:
        if "mine.yaml" in example or "resume=" in example:
            continue
        assert compose_sweep([word for word in example.split() if not word.startswith("-")])


# Plans.


def strict(text: str) -> Any:
    """JSON as other programs read it: without NaN and infinity."""

    def refuse(name: str) -> None:
        raise AssertionError(name)

    return json.loads(text, parse_constant=refuse)


@pytest.fixture(scope="module")
def done(heavy: Commands, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], str]:
    """A finished run, its settings, and what it printed."""
    path = tmp_path_factory.mktemp("done")
    settings = [*FAST, "rounds=3", 'task.title="[/b] :heart:"']
    ended = heavy("run", *settings, "run_dir=run", cwd=path)
    assert ended.code == 0, ended.err
    assert ended.err == "loading torch …\n"
    return path / "run", settings, ended.out


def test_a_plan_says_what_the_run_then_spends(
    done: tuple[Path, list[str], str], heavy: Commands, tmp_path: Path
) -> None:
    folder, settings, _ = done
    ended = heavy("plan", *settings, "--json", cwd=tmp_path)
    plan, summary = strict(ended.out), strict((folder / "summary.json").read_text())
    assert plan["privacy"] == summary["privacy"]
    assert (plan["rounds"], plan["steps_per_round"]) == (3, 1)
    for site in plan["privacy"]["sites"].values():
        assert 0 < site["epsilon"] <= 3.0
        assert site["noise_multiplier"] > 0
        assert site["steps"] == 3
    assert plan["bytes_up_per_round"] == summary["bytes_up_per_round"] > 0
    assert plan["bytes_down_per_round"] == summary["bytes_down_per_round"] > 0
    assert plan["seconds"]["step"] > 0
    memory = plan["memory"]
    assert memory["payload_mb"] * 1e6 * 4 == plan["bytes_up_per_round"]
    assert memory["coordinator_payloads"] == 3
    assert not memory["all_updates_at_once"]
    # A program with torch in it.
    assert min(memory["coordinator_mb"], memory["site_mb"]) > 100
    assert plan["seconds"]["training_per_site"] == pytest.approx(3 * plan["seconds"]["step"])


def test_a_plan_writes_nothing_and_trains_nothing(heavy: Commands, tmp_path: Path) -> None:
    """Also no site's key, which a split by hash makes; a folder for the run is not looked at."""
    here, home = tmp_path / "here", tmp_path / "home"
    here.mkdir()
    noise = "import strategies.rounds as r; r.Loop.run = None"
    ended = heavy(
        "plan",
        *FAST,
        "task.split=hash",
        "run_dir=/dev/null/x",
        cwd=here,
        env={"FEDMED_HOME": str(home)},
        before=noise,
    )
    assert ended.code == 0, ended.err
    for word in (
        "Cleveland",
        "epsilon",
        "noise",
        "steps",
        "bytes a round",
        "s a step",
        "nothing was trained",
    ):
        assert word in ended.out
    assert "NOT PRIVATE" not in ended.out
    assert list(here.iterdir()) == []
    assert not home.exists()


def test_a_plan_without_privacy_says_so(heavy: Commands, tmp_path: Path) -> None:
    for setting, reason in (
        ("privacy=off", "no clipping, no noise"),
        ("privacy.seeded=true", "knows the seed"),
    ):
        ended = heavy("plan", *FAST, setting, cwd=tmp_path)
        assert re.search(rf"^NOT PRIVATE: .*{reason}", ended.out, re.MULTILINE)
    values = strict(heavy("plan", *FAST, "privacy=off", "--json", cwd=tmp_path).out)
    assert values["privacy"]["private"] is False
    assert {site["epsilon"] for site in values["privacy"]["sites"].values()} == {None}


# Runs that do not end well.


# Its plots take longer than the rounds.
NO_REPORT = "import strategies.run; strategies.run.write_report = lambda *_: None"


def last_line(text: str) -> str:
    return text.rstrip("\n").rpartition("\n")[2]


def test_a_run_stopped_by_ctrl_c_tells_how_to_go_on(heavy: Commands, tmp_path: Path) -> None:
    children: list[psutil.Process] = []

    def interrupt(pid: int, out: Path) -> None:
        wait_for(lambda: "round   2/" in out.read_text())
        children.extend(psutil.Process(pid).children(recursive=True))
        os.killpg(pid, signal.SIGINT)

    ended = heavy(
        "run", *FAST, "privacy=off", "rounds=100000", "federation.workers=2", "run_dir=a run", cwd=tmp_path,
        during=interrupt,
    )  # fmt: skip
    assert ended.code == 130
    assert ended.err == (
        "loading torch …\n"
        "error: interrupted; finished rounds are kept: continue with: fedmed run 'resume=a run'\n"
    )
    assert len(children) == 2
    assert not [child for child in children if child.is_running()]
    sent = (tmp_path / "a run" / "journal.jsonl").read_text().count("round-sent")
    again = heavy("run", "resume=a run", f"rounds={sent + 1}", cwd=tmp_path, before=NO_REPORT)
    assert again.code == 0, again.err
    assert strict((tmp_path / "a run" / "summary.json").read_text())["rounds"] == sent + 1


@pytest.mark.parametrize("place", ["build_model", "_say_start", "Loop"])
def test_ctrl_c_before_any_round_leaves_nothing(place: str, heavy: Commands, tmp_path: Path) -> None:
    """While the model loads, once the folder is made, just before the first round is sent."""
    pressed = (
        "import strategies.run, os, signal\n"
        f"setattr(strategies.run, {place!r}, lambda *a, **k: os.kill(os.getpid(), signal.SIGINT))"
    )
    ended = heavy("run", *FAST, cwd=tmp_path, before=pressed)
    assert ended.code == 130
    assert last_line(ended.err) == "error: interrupted; nothing was kept"
    assert "Traceback" not in ended.err
    assert not list(tmp_path.glob("runs/*"))


CANARY = "PATIENT-4711"
BROKEN = f"import strategies.run\ndef broken(*_): raise ValueError('{CANARY}')\nstrategies.run.build_model = broken"


def test_an_unexpected_error_is_one_line_without_its_text(heavy: Commands, tmp_path: Path) -> None:
    ended = heavy("run", *FAST, cwd=tmp_path, before=BROKEN)
    assert ended.code == 1
    assert re.fullmatch(
        r"loading torch …\nerror: internal: ValueError at <string>:2; set FEDMED_DEBUG=1 for the traceback\n",
        ended.err,
    )
    assert CANARY not in ended.out + ended.err
    assert not list(tmp_path.glob("runs/*"))


def test_a_developer_can_ask_for_the_traceback(heavy: Commands, tmp_path: Path) -> None:
    ended = heavy("run", *FAST, cwd=tmp_path, before=BROKEN, env={"FEDMED_DEBUG": "1"})
    assert ended.code == 1
    assert "Traceback" in ended.err
    assert f"ValueError: {CANARY}" in ended.err


def test_the_systems_own_words_are_shown(heavy: Commands, tmp_path: Path) -> None:
    """`No space left on device` holds no data, and is what one needs to know."""
    full = BROKEN.replace(f"ValueError('{CANARY}')", f"OSError(28, 'x', '/{CANARY}')")
    ended = heavy("run", *FAST, cwd=tmp_path, before=full)
    assert ended.code == 1
    assert "internal: OSError (No space left on device) at " in ended.err
    assert CANARY not in ended.err


def test_a_reader_that_is_gone_is_no_error_to_trace(heavy: Commands, tmp_path: Path) -> None:
    """As in `fedmed run | head -1`: the pipe is closed while the run prints."""
    closed = "import os\nreading, writing = os.pipe()\nos.close(reading)\nos.dup2(writing, 1)"
    ended = heavy("run", *FAST, "rounds=2", cwd=tmp_path, before=closed)
    assert "Traceback" not in ended.err
    assert ended.code == 1
    assert ended.err.count("\n") == 1


def test_a_reader_that_is_gone_in_a_shell() -> None:
    command = f"{sys.executable} -c '{MAIN}' run --help | head -1"
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment())
    assert ended.stdout.startswith("Usage: fedmed run")
    assert ended.stderr == ""


def test_a_damaged_run_is_not_resumed(
    done: tuple[Path, list[str], str], light: Commands, tmp_path: Path
) -> None:
    """Said before torch loads, whatever file it is."""
    folder, _, _ = done
    files = ("plans.json", "checkpoint.safetensors", "journal.jsonl")
    for index, name in enumerate(files):
        copy = tmp_path / str(index)
        copy.mkdir()
        for file in ("config.json", *files):
            (copy / file).write_bytes((folder / file).read_bytes())
        (copy / name).write_bytes((folder / name).read_bytes()[:40] + b"\n")
        ended = light("run", f"resume={copy}", cwd=tmp_path)
        assert ended.err == (
            f"error: resume={copy}: its plans.json, journal.jsonl or checkpoint.safetensors is damaged\n"
        )
        assert (ended.code, ended.torch) == (2, False)


def test_a_run_says_where_everything_is(done: tuple[Path, list[str], str]) -> None:
    folder, _, out = done
    assert "run folder: run\n" in out
    # A title as it is, not as markup of the console, which would refuse it after all the work.
    assert "[/b] :heart:: logistic regression" in out
    assert last_line(out) == "run/summary.json"
    assert "* exact, on held-out patients: not covered by epsilon\n" in out
    assert re.search(r"privacy: .*epsilon \d\.\d\d \(PLD\), delta 0.0001, add or remove one patient", out)
    assert (folder / "report.html").exists()
