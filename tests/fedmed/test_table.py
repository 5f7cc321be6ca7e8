"""What becomes of every kind of cell, row, column and file that a table can bring."""

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedmed.compose import compose
from fedmed.data.dataset import SiteDataset
from fedmed.data.sentences import synthetic_sentences
from fedmed.data.table import feature_names, read_csv, read_site, sites_in
from fedmed.errors import DataError
from fedmed.task import TableTaskConfig

HEADER = "site,patient,age,sex,sick"
COLUMNS: dict[str, Any] = {
    "age": {"kind": "numeric", "low": 0, "high": 100, "phrase": "age {value}", "blank": "age not recorded"},
    "sex": {"kind": "categorical", "categories": ["f", "m"], "blank": "sex not recorded"},
}
# A string that stands for a patient's secret: no message may hold it.
CANARY = "Zebedee"


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDMED_HOME", str(tmp_path / "home"))


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """Write lines as a table: forty good rows at site A and twenty at B unless `good` is False."""

    def write(*lines: str, header: str = HEADER, good: bool = True, encoding: str = "utf-8") -> str:
        rows = (
            [f"{'AB'[n // 40]},p{n},{20 + n},{'fm'[n % 2]},{n // 2 % 2}" for n in range(60)] if good else []
        )
        path = tmp_path / "table.csv"
        path.write_text("\n".join([header, *rows, *lines]) + "\n", encoding=encoding)
        return str(path)

    return write


def make_task(path: str, **changes: Any) -> TableTaskConfig:
    settings: dict[str, Any] = {
        "path": path, "site_column": "site", "label": "sick", "patient_column": "patient",
        "columns": COLUMNS, "declared_sizes": {"A": 40, "B": 20},
    }  # fmt: skip
    return TableTaskConfig(**settings | changes)


def read(path: str, site: str = "A", **changes: Any) -> SiteDataset:
    return read_site(make_task(path, **changes), site, seed=0)


def feature(task: TableTaskConfig, data: SiteDataset, name: str) -> np.ndarray:
    return data.features[:, feature_names(task).index(name)]


def test_heart_task_has_its_four_published_sites_with_a_third_held_out() -> None:
    task = compose(["task=heart"]).task
    sizes = {}
    for site, declared in task.declared_sizes.items():
        data = read_site(task, site, seed=0)
        sizes[site] = data.manifest.patients
        assert data.manifest.patients == data.manifest.records == declared == len(data.labels)
        assert data.test.sum() == round(0.34 * declared)
        assert data.features.shape == (declared, len(feature_names(task)))
        assert len(data.texts) == declared
        assert data.manifest.quarantined == {}
        assert set(data.part(test=True)).isdisjoint(data.part(test=False))
    assert list(sizes.values()) == [304, 293, 123, 200]


def test_good_rows_are_all_read(write: Callable[..., str]) -> None:
    path = write()
    data = read(path)
    assert data.manifest.records == data.manifest.patients == 40
    assert data.manifest.positives == data.labels.sum() == 20
    assert data.manifest.quarantined == {}
    assert data.manifest.content_sha256 == hashlib.sha256(Path(path).read_bytes()).hexdigest()
    assert data.texts[:2] == ["age 20, sex f.", "age 21, sex m."]
    assert np.isfinite(data.features).all()


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("A,p90,old,f,1", "age: not a number"),
        ("A,p90,inf,f,1", "age: not a number"),
        ("A,p90,-Infinity,f,1", "age: not a number"),
        ("A,p90,1e999,f,1", "age: not a number"),
        ('A,p90,"40,5",f,1', "age: not a number"),
        ("A,p90,0x20,f,1", "age: not a number"),
        ("A,p90,40,x,1", "sex: category not declared"),
        ("A,p90,40,F,1", "sex: category not declared"),
        ("A,p90,40,f,2", "label-not-declared"),
        ("A,p90,40,f,1.0", "label-not-declared"),
        ("A,p90,40,f,", "label-blank"),
        ("A,p90,40,f,NaN", "label-blank"),
        ("A,,40,f,1", "patient-id-missing"),
        ('A,"  ",40,f,1', "patient-id-missing"),
        ("A,NA,40,f,1", "patient-id-missing"),
        ("A,p90,40", "label-blank"),
    ],
)
def test_a_bad_row_is_left_out_with_a_reason_and_the_others_stay(
    write: Callable[..., str], row: str, reason: str
) -> None:
    data = read(write(row))
    assert data.manifest.quarantined == {reason: 1}
    assert data.manifest.records == 40


def test_rows_without_patient_id_are_not_taken_for_one_patient(write: Callable[..., str]) -> None:
    data = read(write("A,,40,f,1", "A,,41,m,0", "A,null,42,m,0"))
    assert data.manifest.quarantined == {"patient-id-missing": 3}
    assert data.manifest.patients == 40


@pytest.mark.parametrize("cell", ["", "  ", "nan", "NaN", "NA", "n/a", "null", "None"])
def test_a_blank_cell_is_kept_and_marked_or_its_record_dropped(write: Callable[..., str], cell: str) -> None:
    path = write(f"A,p90,{cell},f,1", f"A,p91,40,{cell},0")
    task = make_task(path)
    data = read(path)
    assert data.manifest.quarantined == {}
    assert data.texts[40:] == ["age not recorded, sex f.", "age 40, sex not recorded."]
    assert (feature(task, data, "age blank") > 0).tolist() == [False] * 40 + [True, False]
    assert (feature(task, data, "sex blank") > 0).tolist() == [False] * 40 + [False, True]
    assert feature(task, data, "age")[40] == feature(task, data, "sex=m")[41] == 0

    dropped = read(path, blanks="drop")
    assert dropped.manifest.quarantined == {"age: blank": 1, "sex: blank": 1}
    assert dropped.manifest.records == 40


@pytest.mark.parametrize("cell", ["0", "0.0", "-9", "unknown"])
def test_a_cell_declared_missing_is_marked_even_where_blanks_are_dropped(
    write: Callable[..., str], cell: str
) -> None:
    columns = COLUMNS | {"age": COLUMNS["age"] | {"missing": ["0", "-9", "unknown"]}}
    path = write(f"A,p90,{cell},f,1", "A,p91,,f,1")
    data = read(path, columns=columns, blanks="drop")
    assert data.manifest.quarantined == {"age: blank": 1}
    assert data.texts[40] == "age not recorded, sex f."
    assert feature(make_task(path, columns=columns, blanks="drop"), data, "age blank")[40] > 0


def test_a_declared_category_may_be_called_none(write: Callable[..., str]) -> None:
    columns = COLUMNS | {"sex": {"kind": "categorical", "categories": ["f", "m", "None"]}}
    data = read(write("A,p90,40,None,1"), columns=columns)
    assert data.texts[40] == "age 40, sex None."


def test_numbers_outside_the_declared_range_are_clipped(write: Callable[..., str]) -> None:
    path = write("A,p90,-1e9,f,1", "A,p91,0,f,1", "A,p92,1e9,f,1", "A,p93,100,f,1")
    data = read(path)
    age = feature(make_task(path), data, "age")
    assert age[40:].tolist() == [-1, -1, 1, 1]
    assert data.texts[40] == data.texts[41]
    assert data.texts[42] == data.texts[43]


def test_all_records_of_a_patient_are_on_one_side_even_when_blanks_surround_the_id(
    write: Callable[..., str],
) -> None:
    rows = [f'A,"{" " * (n % 3)}q{n % 10}{" " * (n % 2)}",{n},f,{n % 2}' for n in range(60)]
    data = read(write(*rows))
    assert data.manifest.patients == 50
    assert data.manifest.records == 100
    for patient in np.unique(data.patients):
        assert len(set(data.test[data.patients == patient])) == 1


def test_byte_order_mark_and_blanks_around_cells_and_names_are_ignored(write: Callable[..., str]) -> None:
    path = write("A , p90 , 40 , f , 1 ", header='"site", patient ,age , sex,sick ', encoding="utf-8-sig")
    data = read(path)
    assert data.manifest.records == 41
    assert data.texts[40] == "age 40, sex f."


def test_a_nameless_index_column_is_left_out(write: Callable[..., str]) -> None:
    rows = [f"{n},A,p{n},{20 + n},f,{n % 2}" for n in range(40)]
    assert read(write(*rows, header=f",{HEADER}", good=False)).manifest.records == 40


def test_rows_of_undeclared_and_blank_sites_are_counted_and_change_nothing(write: Callable[..., str]) -> None:
    plain = read(write())
    path = write("C,p90,40,f,1", ",p91,40,f,1", "a,p92,old,x,7")
    data = read(path)
    assert sites_in(make_task(path)) == {"A": 40, "B": 20, "C": 1, "": 1, "a": 1}
    assert data.texts == plain.texts
    assert (data.test == plain.test).all()
    assert data.manifest.quarantined == {}


def test_a_declared_site_without_rows_is_an_error(write: Callable[..., str]) -> None:
    with pytest.raises(DataError, match=r"^site 'C' has no usable record \(no row names it\)"):
        read(write(), "C")


def test_a_site_with_only_bad_rows_is_an_error_with_the_reasons(write: Callable[..., str]) -> None:
    with pytest.raises(DataError, match=r"no usable record \(1 x label-blank; 1 x age: not a number\)"):
        read(write("C,p90,old,f,1", "C,p91,40,f,"), "C")


def test_a_site_of_one_class_is_read_with_a_warning_for_each_part(write: Callable[..., str]) -> None:
    data = read(write(*(f"C,r{n},{n},f,1" for n in range(30))), "C")
    assert data.manifest.positives == 30
    assert data.manifest.warnings == ["training part has one class", "test part has one class"]
    assert read(write()).manifest.warnings == []


def test_a_site_of_one_patient_cannot_be_split(write: Callable[..., str]) -> None:
    path = write("C,p90,40,f,1", "C,p90,41,f,0")
    with pytest.raises(DataError, match=r"^site 'C' has no (training|test) record; it has 1 usable patients"):
        read(path, "C")


@pytest.mark.parametrize("rows", [(), ("C,p90,,f,",), ("C,p90,40,f,1",)])
def test_a_site_with_nobody_in_a_part_is_read_where_that_must_not_be_told(
    rows: tuple[str, ...], write: Callable[..., str]
) -> None:
    data = read_site(make_task(write(*rows)), "C", seed=0, key=b"k" * 32, maybe_empty=True)
    whole = read(write())
    found = data.manifest.patients
    assert found == len(data.labels) == len(data.texts) == len(data.pseudonyms) == (rows == ("C,p90,40,f,1",))
    assert data.features.shape == (found, whole.features.shape[1])
    assert data.features.dtype == whole.features.dtype
    assert sorted([len(data.part(test=False)), len(data.part(test=True))]) == [0, found]


def test_without_a_patient_column_each_record_is_a_unit(write: Callable[..., str]) -> None:
    data = read(write("A,p0,40,f,1", "A,,41,f,1"), patient_column=None)
    assert data.manifest.patients == data.manifest.records == 42
    assert make_task("x", patient_column=None).unit == "record"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"site_column": "sit"}, "task.site_column=sit: the table has no such column; did you mean 'site'?"),
        ({"label": "ill"}, "task.label=ill: the table has no such column; valid: age, patient, sex, sick, site"),
        ({"patient_column": "patients"}, "task.patient_column=patients: the table has no such column; did you "
                                         "mean 'patient'?"),
        ({"columns": COLUMNS | {"gender": COLUMNS["sex"]}}, "task.columns.gender: the table has no such column"),
        ({"columns": {"sick": COLUMNS["sex"]}}, "task.columns.sick: is the label"),
        ({"columns": {"patient": COLUMNS["sex"]}}, "task.columns.patient: is the label or the patient's id"),
        ({"columns": {}}, "task.columns: none declared; propose them with: fedmed task describe FILE"),
    ],
)  # fmt: skip
def test_a_column_that_is_missing_or_must_not_be_read_is_named(
    write: Callable[..., str], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError) as caught:
        read(write(), **changes)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "an empty file"),
        (b"\n\n", "an empty file"),
        (HEADER.encode() + b"\n", "a header and no record"),
        (f"{HEADER}\nA,{CANARY},40,f,1,{CANARY}\n".encode(), "line 2 has more cells than the header"),
        (f'{HEADER}\nA,"{CANARY},40,f,1\n'.encode(), "a quote is never closed"),
        (f"{HEADER}\nA,{CANARY}\xe9,40,f,1\n".encode("latin-1"), "not text in UTF-8"),
        (f"{HEADER}\nA,{CANARY},40,f,1\n".encode("utf-16"), "not text in UTF-8"),
        (f"{HEADER}\nA,{CANARY},40,f,1\n".replace(",", ";").encode(), "separated by ';'; expected commas"),
        (f"site,age,age\nA,{CANARY},1\n".encode(), "1 column name(s) stand twice in the header"),
    ],
)
def test_a_file_that_is_no_table_is_one_clear_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "broken.csv"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read(str(path))
    text = str(caught.value)
    assert text.startswith(f"task.path={path}: ")
    assert message in text
    assert CANARY not in text
    assert "\n" not in text


def test_a_path_that_is_no_readable_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(error: OSError) -> None:
        def read_bytes(_: Path) -> bytes:
            raise error

        monkeypatch.setattr(Path, "read_bytes", read_bytes)

    with pytest.raises(DataError, match=r"nowhere\.csv: no such file"):
        read_csv(str(tmp_path / "nowhere.csv"))
    for path in (str(tmp_path), "/dev/zero"):
        with pytest.raises(DataError, match="a folder or a device; expected a CSV file"):
            read_csv(path)
    with pytest.raises(DataError, match="no installed package 'no_such_package'"):
        read_csv("pkg://no_such_package/table.csv")
    for path in ("x" * 5000, "a\0b", "~no-such-user/table.csv"):
        with pytest.raises(DataError, match="cannot be read"):
            read_csv(path)
    # Root may read every file, so that only a stand-in shows these two.
    refuse(PermissionError(13, "Permission denied"))
    with pytest.raises(DataError, match="no permission to read it"):
        read_csv(str(tmp_path / "table.csv"))
    refuse(OSError(5, "Input/output error"))
    with pytest.raises(DataError, match="cannot be read"):
        read_csv(str(tmp_path / "table.csv"))


@pytest.mark.parametrize("label", [CANARY, "sick"])
def test_a_first_line_that_may_be_a_record_is_never_listed(write: Callable[..., str], label: str) -> None:
    path = write("B,p90,40,m,0", header=f"A,{CANARY},63,f,1")
    with pytest.raises(DataError, match="is the first line of the file its header") as caught:
        read(path, site_column="Zebedeee" if label == CANARY else "site")
    assert CANARY not in str(caught.value).removeprefix("task.site_column=Zebedeee")


def canary_rows() -> list[str]:
    good = ["A", "p1", "40", "f", "1"]
    return [",".join([*good[:place], f"{CANARY}{place}", *good[place + 1 :]]) for place in range(5)]


@pytest.mark.parametrize("row", canary_rows())
@pytest.mark.parametrize(
    "changes",
    [
        {}, {"blanks": "drop"}, {"split": "shuffle", "public_benchmark": True},
        {"patient_column": None}, {"label": "nothing"},
        {"site_column": "nothing"}, {"positive": ["p1"], "negative": ["f"]}, {"columns": {"nothing": COLUMNS["age"]}},
    ],
)  # fmt: skip
def test_no_message_holds_a_cell(write: Callable[..., str], row: str, changes: dict[str, Any]) -> None:
    """One row, bad in one cell: whatever is wrong, neither an error nor the manifest repeats the cell."""
    said = []
    for site in ("A", "B"):
        try:
            said.append(str(dataclasses.asdict(read(write(row, good=False), site, **changes).manifest)))
        except DataError as error:
            said.append(str(error))
    assert len(said) == 2
    assert CANARY not in "".join(said)


def test_synthetic_sentences_come_from_the_declaration_alone() -> None:
    """The same at every call and for every table: none is opened."""
    task = make_task("/nowhere/at/all.csv")
    sentences = synthetic_sentences(task, 200)
    assert sentences == synthetic_sentences(task, 200)
    assert sentences == synthetic_sentences(dataclasses.replace(task, path="other.csv"), 200)
    assert sentences[:50] == synthetic_sentences(task, 50)
    assert {"sex f", "sex m", "sex not recorded"} == {
        text.removesuffix(".").split(", ")[1] for text in sentences
    }
    ages = [int(text.split(",")[0].removeprefix("age ")) for text in sentences if "age not" not in text]
    assert min(ages) >= 0
    assert max(ages) <= 100


def test_braces_in_a_columns_name_are_only_braces(write: Callable[..., str]) -> None:
    path = write(header="site,patient,{age},sex,sick")
    data = read(path, columns={"{age}": {"kind": "numeric", "low": 0, "high": 100}})
    assert data.texts[0] == "{age} 20."


def test_one_record_changes_no_other_records_features_or_text(write: Callable[..., str]) -> None:
    """Scaling, categories and phrases are constants of the declaration (privacy.md, rule 9)."""
    plain = read(write())
    more = read(write("A,p90,99999,m,1", "A,p91,x,y,z"))
    assert (more.features[:40] == plain.features).all()
    assert more.texts[:40] == plain.texts


def test_pseudonyms_are_one_a_patient_and_need_the_site_s_key(write: Callable[..., str]) -> None:
    """privacy.md, rule 18: nobody without the key can hash a list of names and compare."""
    task = make_task(write("A,p1,50,f,1"))
    ours = read_site(task, "A", seed=0, key=b"k" * 32)
    assert len(ours.pseudonyms) == len(set(ours.pseudonyms)) == ours.patients.max() + 1
    assert ours.pseudonyms == read_site(task, "A", seed=1, key=b"k" * 32).pseudonyms
    assert not set(ours.pseudonyms) & set(read_site(task, "A", seed=0, key=b"j" * 32).pseudonyms)
    assert hashlib.sha256(b"p1").digest()[:16] not in ours.pseudonyms
    assert read_site(task, "A", seed=0).pseudonyms == ()
    assert ours.pseudonyms[0].hex() not in repr(ours)
