"""A table's declaration: proposed from it, written to a file, edited, read back, and filled where that is public."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.testing import CliRunner

from fedmed.cli.main import main
from fedmed.cli.task import app
from fedmed.compose import compose
from fedmed.data.describe import examine, fill, propose, to_yaml, widen
from fedmed.data.table import read_site
from fedmed.errors import ConfigError, DataError, FedmedError
from fedmed.task import TableTaskConfig

HEADER = "hospital,mrn,age,resting_bp,sex,stage,note,visit,sick"
ROLES: dict[str, Any] = {"site_column": "hospital", "label": "sick", "patient_column": "mrn"}
CANARY = "Zebedee"


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDMED_HOME", str(tmp_path / "home"))


def row(n: int) -> list[str]:
    """The record of patient n: two each in the first ten, a blank blood pressure now and then."""
    bp = "" if n % 7 == 0 else str(100 + n)
    return [
        "St. Mary" if n < 30 else "Nord", f"m{max(n - 10, 0) if n < 20 else n}", str(28 + n), bp, "fm"[n % 2],
        ["I", "II", "none"][n % 3], f"{CANARY} {n}", str(n), ["no", "yes"][n % 2],
    ]  # fmt: skip


@pytest.fixture
def table(tmp_path: Path) -> Callable[..., str]:
    """Write fifty records, in which `cells` (row, column) -> text are changed, as a table."""

    def table(cells: dict[tuple[int, str], str] | None = None, header: str = HEADER) -> str:
        rows = [row(n) for n in range(50)]
        for (place, name), text in (cells or {}).items():
            rows[place][HEADER.split(",").index(name)] = text
        path = tmp_path / "table.csv"
        path.write_text("\n".join([header, *(",".join(cells) for cells in rows)]) + "\n")
        return str(path)

    return table


@pytest.fixture
def declaration(tmp_path: Path) -> Callable[[str], str]:
    def declaration(text: str) -> str:
        path = tmp_path / "declaration.yaml"
        path.write_text(text)
        return str(path)

    return declaration


def test_the_proposal_of_a_table(table: Callable[..., str]) -> None:
    path = table()
    proposal = examine(path, **ROLES)
    assert proposal.declaration == {
        "path": path,
        "declare": "from_data",
        **ROLES,
        "positive": ["yes"],
        "negative": ["no"],
        "declared_sizes": {"Nord": 20, "St. Mary": 20},
        "columns": {
            "age": {"kind": "numeric", "low": 20, "high": 80, "decimals": 0, "phrase": "age {value}"},
            "resting_bp": {
                "kind": "numeric", "low": 100, "high": 150, "decimals": 0,
                "phrase": "resting bp {value}", "blank": "resting bp not recorded",
            },
            "sex": {"kind": "categorical", "categories": ["f", "m"], "phrase": "sex {value}"},
            "stage": {"kind": "categorical", "categories": ["I", "II", "none"], "phrase": "stage {value}"},
        },
    }  # fmt: skip
    assert proposal.left_out == {
        "note": "free text or codes: 50 distinct texts in 50 cells",
        "visit": "an identifier: counts the records",
    }
    assert proposal.remarks == []
    assert propose(path, **ROLES) == proposal.declaration


def test_without_a_patient_column_sizes_are_records_and_an_id_is_left_out(table: Callable[..., str]) -> None:
    proposal = examine(table(), **ROLES | {"patient_column": None})
    assert proposal.declaration["declared_sizes"] == {"Nord": 20, "St. Mary": 30}
    assert proposal.left_out["mrn"] == "an identifier, by its name"
    assert proposal.remarks == ["no patient column: the unit of privacy is the record, not the patient"]


def test_records_that_a_run_would_leave_out_are_counted_not_declared(table: Callable[..., str]) -> None:
    cells = {(30, "hospital"): "", (31, "mrn"): "NA", (32, "sick"): "", (33, "age"): f"{CANARY} years"}
    proposal = examine(table(cells), **ROLES)
    assert proposal.declaration["declared_sizes"] == {"Nord": 17, "St. Mary": 20}
    assert proposal.remarks == [
        "age: 1 cell(s) are not numbers: their records are left out",
        "3 record(s) have no site, no declared label or no patient id",
    ]


def test_a_site_of_one_class_is_remarked(table: Callable[..., str]) -> None:
    proposal = examine(table({(n, "sick"): "yes" for n in range(30, 50)}), **ROLES)
    assert proposal.remarks == ["1 site(s) have records of one class only"]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (28, 77, (20, 80)), (71, 202, (70, 210)), (-2.6, 6.2, (-3, 7)), (0, 1, (0, 1)), (5, 5, (0, 10)),
        (0, 0, (-0.5, 0.5)), (0.123, 0.171, (0.12, 0.18)), (-1e300, 1e300, (-1e300, 1e300)), (1e-9, 3e-9, (1e-9, 3e-9)),
        (36.4, 41.9, (36, 42)),
    ],
)  # fmt: skip
def test_a_range_is_widened_outward_to_round_numbers(low: float, high: float, expected: Any) -> None:
    assert widen(low, high) == expected
    assert expected[0] <= low <= high <= expected[1]
    assert expected[0] < expected[1]


@pytest.mark.parametrize(
    ("texts", "positive", "negative"),
    [
        (("0", "1"), ["1"], ["0"]),
        (("0.0", "1.0"), ["1.0"], ["0.0"]),
        (("No", "YES"), ["YES"], ["No"]),
        (("True", "false"), ["True"], ["false"]),
        (("absent", "present"), ["present"], ["absent"]),
        (("1", "1"), ["1"], ["0"]),
        (("n", "n"), ["y"], ["n"]),
    ],
)
def test_the_label_is_guessed_from_known_pairs(
    table: Callable[..., str], texts: tuple[str, str], positive: list[str], negative: list[str]
) -> None:
    path = table({(n, "sick"): texts[n % 2] for n in range(50)})
    declaration = propose(path, **ROLES)
    assert (declaration["positive"], declaration["negative"]) == (positive, negative)


def test_another_label_needs_its_positive_values(table: Callable[..., str]) -> None:
    path = table({(n, "sick"): ["I", "II", "III"][n % 3] for n in range(50)})
    with pytest.raises(DataError, match=r"^label column 'sick': 3 distinct value\(s\).*--positive VALUE"):
        propose(path, **ROLES)
    given = examine(path, **ROLES, positive=["III", "II"]).declaration
    assert (given["positive"], given["negative"]) == (["III", "II"], ["I"])
    given = examine(path, **ROLES, negative=["I"]).declaration
    assert (given["positive"], given["negative"]) == (["II", "III"], ["I"])
    with pytest.raises(DataError, match=r"^positive=IV: no record has it in the label column 'sick'$"):
        examine(path, **ROLES, positive=["IV"])
    with pytest.raises(
        DataError, match=r"^positive: label column 'sick' has 0 other values; expected 1 to 20$"
    ):
        examine(path, **ROLES, positive=["I", "II", "III"])
    with pytest.raises(DataError, match="has 49 other values"):
        examine(path, **ROLES | {"label": "age"}, positive=["28"])


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        (
            {"site_column": None},
            f"no site column named; choose with --site-column from: {HEADER.replace(',', ', ')}",
        ),
        ({"label": None}, f"no label column named; choose with --label from: {HEADER.replace(',', ', ')}"),
        ({"site_column": "hospitl"}, "site column 'hospitl': the table has none; did you mean 'hospital'?"),
        ({"label": "sik"}, "label column 'sik': the table has none; did you mean 'sick'?"),
        ({"patient_column": "mrm"}, "patient column 'mrm': the table has none; did you mean 'mrn'?"),
        ({"label": "hospital"}, "site, label and patient column: expected different columns"),
    ],
)
def test_a_role_without_its_column_names_the_columns(
    table: Callable[..., str], roles: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError) as caught:
        propose(table(), **ROLES | roles)
    assert str(caught.value) == message


def test_a_site_column_with_too_many_values_and_a_table_without_features_are_refused(
    table: Callable[..., str], tmp_path: Path
) -> None:
    path = tmp_path / "many.csv"
    path.write_text("who,age,sick\n" + "".join(f"{CANARY}{n},{n % 9},{n % 2}\n" for n in range(101)))
    with pytest.raises(DataError, match="101 distinct values; expected at most 100 sites"):
        propose(str(path), site_column="who", label="sick", patient_column=None)
    path.write_text("site,note,sick\n" + "".join(f"A,{CANARY}{n},{n % 2}\n" for n in range(9)))
    with pytest.raises(DataError, match="no column can be declared"):
        propose(str(path), site_column="site", label="sick", patient_column=None)
    with pytest.raises(DataError, match="no record has a site, a label"):
        propose(table({(n, "mrn"): "" for n in range(50)}), **ROLES)


def test_no_message_of_describe_holds_a_cell(table: Callable[..., str]) -> None:
    """Errors, reasons and remarks speak of columns and counts; only the proposal itself shows sites, categories."""
    said = []
    for name in HEADER.split(","):
        for cells in ({(n, name): f"{CANARY}{n}" for n in range(50)}, {(3, name): CANARY}):
            for roles in (ROLES, ROLES | {"patient_column": None}, ROLES | {"label": "nothing"}):
                try:
                    proposal = examine(table(cells), **roles)
                    said.append(f"{proposal.left_out} {proposal.remarks}")
                except FedmedError as error:
                    said.append(str(error))
    headless = table(header=",".join(row(0)))
    for roles in (ROLES, dict.fromkeys(ROLES)):
        with pytest.raises(DataError, match="is the first line of the file its header") as caught:
            propose(headless, **roles)
        said.append(str(caught.value))
    assert len(said) == 9 * 2 * 3 + 2
    assert CANARY not in "".join(said)


def test_the_file_reads_back_as_what_was_proposed(
    table: Callable[..., str], declaration: Callable[[str], str]
) -> None:
    """Also where a cell looks like YAML's or OmegaConf's grammar."""
    odd = [
        "${oc.env:HOME}",
        "yes",
        "1e5",
        "a: b",
        "ü",
        "\\${x}",
        "'",
        "# no",
        "0x1",
        "1:30",
        "{value}",
        "-",
        "~",
        "${",
    ]
    path = table(
        {(n, "stage"): odd[n % len(odd)] for n in range(50)} | {(n, "hospital"): "on" for n in range(30, 50)}
    )
    proposed = propose(path, **ROLES)
    text = to_yaml(proposed)
    assert text.startswith("# Proposed by `fedmed task describe` from the records")
    assert "review" in text[: text.index("path:")]
    assert "clinical knowledge" in text
    assert yaml.safe_load(text) == proposed
    file = declaration(text)
    task = compose(["task=csv", f"task.declaration={file}"]).task
    assert task == TableTaskConfig(**proposed, title="a table", declaration=file)
    assert set(task.columns["stage"].categories) == set(odd)
    sites = {site: read_site(task, site, seed=0).manifest for site in task.declared_sizes}
    assert {site: manifest.patients for site, manifest in sites.items()} == proposed["declared_sizes"]
    assert all(manifest.quarantined == {} for manifest in sites.values())


def test_a_proposal_is_not_private_until_somebody_says_that_it_is_declared(
    table: Callable[..., str], declaration: Callable[[str], str]
) -> None:
    text = to_yaml(propose(table(), **ROLES))
    config = compose(["task=csv", f"task.declaration={declaration(text)}"])
    assert not config.private
    assert str(config.not_private_reason()).startswith("task.declare=from_data")
    reviewed = text.replace("declare: from_data", "declare: declared")
    assert reviewed != text
    config = compose(["task=csv", f"task.declaration={declaration(reviewed)}"])
    assert config.private
    assert config.not_private_reason() is None


FROM_DATA = ["task=csv", "task.declare=from_data", "task.site_column=hospital", "task.label=sick",
             "task.patient_column=mrn"]  # fmt: skip


def test_from_data_fills_what_nobody_declared_and_is_not_private(table: Callable[..., str]) -> None:
    path = table()
    config = compose([*FROM_DATA, f"task.path={path}"])
    assert config.task == TableTaskConfig(**propose(path, **ROLES), title="a table")
    assert not config.private
    assert str(config.not_private_reason()).startswith("task.declare=from_data")


def test_what_is_declared_wins_over_the_table(table: Callable[..., str]) -> None:
    path = table({(n, "sick"): ["0", "1", "2"][n % 3] for n in range(50)})
    texts = [*FROM_DATA, f"task.path={path}"]
    with pytest.raises(DataError, match=r"task\.positive=\[VALUE\]"):
        compose(texts)
    task = compose([*texts, "task.positive=['2']"]).task
    assert (task.positive, task.negative) == (["2"], ["0", "1"])
    task = compose([*texts, "task.positive=['1']", "task.negative=['0']"]).task
    assert (task.positive, task.negative) == (["1"], ["0"])
    assert task.declared_sizes == {"Nord": 14, "St. Mary": 13}
    task = compose([*texts, "task.positive=['1']", "task.declared_sizes={Nord: 500}"]).task
    assert task.declared_sizes == {"Nord": 500}
    column = "task.columns={age: {kind: numeric, low: 0, high: 120}}"
    task = compose([*texts, "task.positive=['1']", column]).task
    assert list(task.columns) == ["age"]
    assert (task.columns["age"].low, task.columns["age"].high) == (0, 120)


def test_a_whole_declaration_opens_no_table(table: Callable[..., str]) -> None:
    task = TableTaskConfig(**propose(table(), **ROLES) | {"path": "/nowhere.csv"})
    assert fill(task, declared=["positive", "negative"]) is task
    assert (
        compose(["task=heart", "task.declare=from_data"]).task.columns.keys()
        == compose([]).task.columns.keys()
    )
    with pytest.raises(DataError, match=r"^task.path=/nowhere.csv: no such file$"):
        compose([*FROM_DATA, "task.path=/nowhere.csv"])


def test_values_typed_beside_a_declaration_win_and_its_path_stays(
    table: Callable[..., str], declaration: Callable[[str], str]
) -> None:
    file = declaration(to_yaml(propose(table(), **ROLES)))
    late = ["task.columns.age.low=0", "task.test_fraction=0.5", "task.declare=declared", "task.positive=['no', yes]",
            "task.negative=[maybe]"]  # fmt: skip
    for texts in ([f"task.declaration={file}", *late], [*late, f"task.declaration={file}"]):
        task = compose(["task=csv", *texts]).task
        assert (task.columns["age"].low, task.columns["age"].high) == (0, 80)
        assert (task.test_fraction, task.declare) == (0.5, "declared")
        assert (task.positive, task.negative) == (["no", "yes"], ["maybe"])
        assert task.declaration == file


def test_a_key_of_a_declaration_replaces_the_options_whole_value(declaration: Callable[[str], str]) -> None:
    file = declaration("declared_sizes: {Hungary: 100}\ncolumns:\n  age: {low: 0, high: 90}\n")
    task = compose(["task=heart", f"task.declaration={file}"]).task
    assert task.declared_sizes == {"Hungary": 100}
    assert list(task.columns) == ["age"]
    assert task.site_column == "dataset"
    assert compose(["task=heart", "task.declaration=null"]).task.declaration is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("colums: {}", "unknown key 'colums'; did you mean 'columns'?"),
        ("labels: sick", "unknown key 'labels'; did you mean 'label'?"),
        ("kind: table", "unknown key 'kind'"),
        ("declaration: other.yaml", "unknown key 'declaration'"),
        ("columns: {age: {lo: 1}}", "columns.age: unknown key 'lo'; did you mean 'low'?"),
        ("columns: [age]", "columns: expected NAME:"),
        ("columns: {age: 3}", "columns: expected NAME:"),
        ("columns:", "columns: expected NAME:"),
        ("columns: {age: {low: 1, high: 2}, age: {low: 3, high: 4}}", "a key stands twice (line 1 or below)"),
        ("positive: [yes]", "positive: YAML reads an entry as something else than text; put each in quotes"),
        ("columns: {c: {categories: [01, 02]}}", "columns.c.categories: YAML reads an entry"),
        ("declared_sizes: {no: 100}", "declared_sizes: YAML reads a name as true, false or null"),
        ("declared_sizes: {A: many}", "declared_sizes: expected a mapping, e.g. {a: 1}"),
        ("test_fraction: half", "test_fraction: expected a number"),
        ("test_fraction: 2", "task.test_fraction=2.0: expected between 0 and 1"),
        ("columns: {age: {low: 9, high: 1}}", "task.columns.age.low/high=(9.0, 1.0): expected low < high"),
        ("columns: {age: {low: a, high: 1}}", "task.columns.age.low='a': expected"),
        ("columns: {age: {low: 0, high: 1, cutoffs: [0.5], cutoff_words: [few, many]}}", None),
        ("path: [", "not YAML in UTF-8, or a key stands twice (line 1 or below)"),
        ("? [a]\n: 1", "not YAML in UTF-8"),
        ("!!python/object/apply:os.system ['true']", "not YAML in UTF-8"),
        ("", "expected lines of KEY: VALUE"),
        ("- age", "expected lines of KEY: VALUE"),
        ("3", "expected lines of KEY: VALUE"),
    ],
)
def test_a_bad_declaration_is_one_clear_line(
    declaration: Callable[[str], str], text: str, message: str | None
) -> None:
    texts = ["task=heart", f"task.declaration={declaration(text)}"]
    if message is None:
        compose(texts)
        return
    with pytest.raises(ConfigError) as caught:
        compose(texts)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_declaration_that_is_no_readable_file_is_named(
    tmp_path: Path,
    declaration: Callable[[str], str],
    table: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refusal(path: object) -> str:
        with pytest.raises(ConfigError) as caught:
            compose(["task=csv", f"task.declaration={path}"])
        assert str(caught.value).startswith(f"task.declaration={path}: ")
        return str(caught.value)

    assert "no such file; fedmed task describe FILE proposes one" in refusal(tmp_path / "nowhere.yaml")
    assert "cannot be read (Is a directory)" in refusal(tmp_path)
    assert "cannot be read" in refusal("/" + "x" * 300)
    # The table in place of its declaration: nothing of it is shown.
    assert CANARY not in refusal(table())
    file = declaration("x")
    Path(file).write_bytes(b"label: \xff\n")
    assert "not YAML in UTF-8" in refusal(file)
    with pytest.raises(ConfigError, match="expected text or null"):
        compose(["task=csv", "task.declaration=[a,b]"])

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refuse)
    assert "cannot be read (Permission denied)" in refusal(file)


def test_neither_compose_nor_the_command_line_brings_pandas_before_it_is_needed() -> None:
    code = (
        "import sys\n"
        "import fedmed.cli.task\n"
        "from fedmed.compose import compose\n"
        "compose(['task=heart', 'task.declare=from_data'][:1])\n"
        "sys.exit('pandas' in sys.modules or 'torch' in sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0


def describe(*arguments: str) -> Any:
    root = typer.Typer()
    root.add_typer(app, name="task")
    return CliRunner().invoke(root, ["task", "describe", *arguments], catch_exceptions=True)


OPTIONS = ["--site-column", "hospital", "--label", "sick", "--patient-column", "mrn"]


def test_describe_prints_yaml_and_says_on_stderr_what_is_missing_and_what_comes_next(
    table: Callable[..., str],
) -> None:
    path = table()
    result = describe(path, *OPTIONS)
    assert result.exit_code == 0
    assert result.stdout == to_yaml(propose(path, **ROLES))
    assert "left out: note (free text or codes" in result.stderr
    assert "fedmed run task=csv task.declaration=FILE.yaml" in result.stderr
    assert CANARY not in result.output


def test_describe_prints_json_with_what_was_left_out(table: Callable[..., str]) -> None:
    path = table()
    result = describe(path, *OPTIONS, "--json")
    values = json.loads(result.stdout)
    assert values["declaration"] == propose(path, **ROLES)
    assert values["left_out"].keys() == {"note", "visit"}
    assert values["remarks"] == []


def test_describe_takes_positive_values(table: Callable[..., str]) -> None:
    path = table({(n, "sick"): ["I", "II", "III"][n % 3] for n in range(50)})
    result = describe(path, *OPTIONS, "--positive", "III", "--positive", "II")
    assert yaml.safe_load(result.stdout)["positive"] == ["III", "II"]
    assert yaml.safe_load(result.stdout)["negative"] == ["I"]


def test_describe_writes_a_file_that_the_next_command_reads(
    table: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, before = table(), set(os.listdir(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name, setting in (
        ("d.yaml", "task.declaration=d.yaml"),
        ('a "b" c.yaml', r'task.declaration="a \"b\" c.yaml"'),
    ):
        result = describe(path, *OPTIONS, "--output", name)
        assert (result.exit_code, result.stdout) == (0, "")
        command = result.stderr.strip().splitlines()[-1].partition("then: ")[2].partition("then: ")[2]
        echoed = subprocess.run(
            ["sh", "-c", f"printf '%s\\n' {command}"], capture_output=True, text=True, check=True
        )
        assert echoed.stdout.splitlines() == ["fedmed", "run", "task=csv", setting]
        assert compose(["task=csv", setting]).task.declaration == name
    assert set(os.listdir(tmp_path)) - before == {"d.yaml", 'a "b" c.yaml'}


def test_describe_replaces_a_file_only_when_forced(table: Callable[..., str], tmp_path: Path) -> None:
    path, output = table(), tmp_path / "mine.yaml"
    output.write_text("edited by hand")
    result = describe(path, *OPTIONS, "--output", str(output))
    assert isinstance(result.exception, ConfigError)
    assert str(result.exception) == f"--output={output}: exists already; replace it with --force"
    assert output.read_text() == "edited by hand"
    assert describe(path, *OPTIONS, "--output", str(output), "--force").exit_code == 0
    assert yaml.safe_load(output.read_text())["path"] == path
    for bad, message in (
        (path, "is the table itself"),
        (str(tmp_path), "a folder"),
        ("/no/x.yaml", "no folder '/no'"),
    ):
        result = describe(path, *OPTIONS, "--output", bad, "--force")
        assert isinstance(result.exception, ConfigError)
        assert message in str(result.exception)
    assert Path(path).read_text().startswith(HEADER)


def test_describe_leaves_nothing_half_written(
    table: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = table()
    before = set(os.listdir(tmp_path))
    output = tmp_path / "d.yaml"
    assert isinstance(describe(path, "--output", str(output)).exception, DataError)
    assert set(os.listdir(tmp_path)) == before

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    result = describe(path, *OPTIONS, "--output", str(output))
    assert isinstance(result.exception, ConfigError)
    assert str(result.exception) == f"--output={output}: cannot be written (No space left on device)"
    assert set(os.listdir(tmp_path)) == before


@pytest.mark.parametrize(
    "arguments",
    [
        ["task", "describe", "/nowhere.csv", *OPTIONS],
        ["task", "describe", "TABLE"],
        ["task", "describe", "TABLE", *OPTIONS, "--positive", "IV"],
        ["task", "describe"],
        ["task", "describe", "TABLE", "--no-such-option"],
    ],
)
def test_bad_input_ends_with_one_line_and_exit_code_2(
    table: Callable[..., str],
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = table()
    monkeypatch.setattr(sys, "argv", ["fedmed", *(path if text == "TABLE" else text for text in arguments)])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len([line for line in captured.err.splitlines() if line.lower().startswith("error: ")]) == 1
    assert "Traceback" not in captured.err
    assert CANARY not in captured.err


def test_help_has_examples_and_keeps_their_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["fedmed", "task", "describe", "--help"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert "\n    fedmed task describe patients.csv --site-column hospital --label outcome --json\n" in shown
    assert "--patient-column NAME" in shown
