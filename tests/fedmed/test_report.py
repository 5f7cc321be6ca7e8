"""The report: what must stand beside an epsilon, what must not stand in a report that is NOT PRIVATE."""

import copy
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pytest

from fedmed.errors import PrivacyError
from fedmed.private_metrics import NoisyHistogram, bin_edges
from fedmed.report.html import write_report

ADJACENCY = "add or remove one patient with all of its records"
# No epsilon is also a metric or another one; each is printed rounded up, here never to what nearest would give.
SPENT = {"Cleveland": (2.1212, 2.4545), "Switzerland": (1.3131, 1.6161)}
PRINTED = {
    "one": "2.13",
    "other": "1.32",
    "rdp": "2.46",
    "other rdp": "1.62",
    "all sites": "4.78",
    "target": "2.52",
}
VOID = {"meta", "br", "link", "img"}
# What holds an epsilon together with what must stand beside it.
BLOCKS = {"table", "figure", "p", "div"}


def result(auc: float | None, accuracy: float, other: float | None = 0.7171) -> dict[str, Any]:
    sites = {"Cleveland": {"auc": auc, "accuracy": accuracy}, "Switzerland": {"auc": other, "accuracy": 0.9}}
    return {"auc": auc, "accuracy": accuracy, "sites": sites}


def private_run() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    plan = {"delta": 1e-4, "noise_multiplier": 5.471, "sample_rate": 1.0, "steps": 3, "declared_size": 201}
    spent = {site: {"epsilon": pld, "epsilon_rdp": rdp, **plan} for site, (pld, rdp) in SPENT.items()}
    privacy = {
        "private": True,
        "not_private_reason": None,
        "unit": "patient",
        "adjacency": ADJACENCY,
        "delta": 1e-4,
        "accountant": "pld",
        "target_epsilon": 2.5151,
        "sites": spent,
        "consortium": {
            "one_site": {"epsilon": 2.1212, "delta": 1e-4},
            "all_sites": {"epsilon": 4.7711, "delta": 1e-4},
            "assumption": "a patient's records are at one site",
        },
        "in_words": "Someone half sure that a patient took part can become at most 90% sure (up to delta).",
        "metrics": {"release": "exact"},
        "outside": ["hyperparameters were tuned outside epsilon", "pretraining data is outside epsilon"],
    }
    summary = {
        "name": "demo",
        "created": "2026-11-21T22:40:00+00:00",
        "version": "0.1.0",
        "seed": 0,
        "task": "heart disease in two hospitals",
        "model": "minilm",
        "adapter": "head",
        "strategy": "fedavg",
        "test": {"release": "exact", "covered_by_epsilon": False, **result(0.8181, 0.8282)},
        "privacy": privacy,
        "references": None,
        "rounds": 3,
        "seconds": {"total": 40.14, "training": 3.2},
        "bytes_up_per_round": 10_240,
        "bytes_down_per_round": 20_480,
        "peak_rss_mb": 900,
        "artifacts": {"report": "report.html", "card": "MODEL_CARD.md", "adapter": "adapter"},
        "mlflow": None,
    }
    history = [
        {
            "round": number,
            "sites": ["Cleveland", "Switzerland"] if number != 2 else ["Cleveland"],
            "dropped": {} if number != 2 else {"Switzerland": "no answer"},
            "auc": 0.6 + number / 20,
            "accuracy": 0.8,
            "site_metrics": result(0.6 + number / 20, 0.8)["sites"],
            "epsilon": {site: pld * number / 3 for site, (pld, _) in SPENT.items()},
            "bytes_up": 10_240,
            "bytes_down": 20_480,
            "seconds": 0.1,
        }
        for number in (1, 2, 3)
    ]
    return summary, history


def not_private_run() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """As `strategies.summary` leaves it: null where there is no claim."""
    summary, history = private_run()
    none = dict.fromkeys(("delta", "accountant", "target_epsilon", "consortium", "in_words"))
    summary["privacy"] |= {
        "private": False,
        "not_private_reason": "privacy=off: no clipping, no noise",
        **none,
    }
    for plan in summary["privacy"]["sites"].values():
        plan |= {"epsilon": None, "epsilon_rdp": None, "delta": None, "noise_multiplier": 0.0}
    for entry in history:
        entry["epsilon"] = dict.fromkeys(entry["epsilon"])
    return summary, history


class Page(HTMLParser):
    """The page's tags, and the text (with alternatives of figures) of each innermost block of BLOCKS."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.blocks: list[str] = []
        self._open: list[str] = []
        self._texts: list[str] = []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in VOID:
            return
        self._open.append(tag)
        if tag in BLOCKS:
            self._texts.append("")
        self.handle_data(dict(attrs).get("aria-label") or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, f"</{tag}> closes something else"
        if tag in BLOCKS:
            self.blocks.append(" ".join(self._texts.pop().split()))

    def handle_data(self, data: str) -> None:
        if self._texts and "style" not in self._open:
            self._texts[-1] += data + " "

    @property
    def text(self) -> str:
        return " ".join(self.blocks)


def render(folder: Path, run: tuple[dict[str, Any], list[dict[str, Any]]]) -> tuple[str, Page]:
    write_report(*run, folder / "report.html")
    source = (folder / "report.html").read_text()
    return source, Page(source)


@pytest.mark.parametrize("unit", ["patient", "record"])
def test_every_epsilon_has_its_unit_adjacency_delta_and_accountant_beside_it(
    tmp_path: Path, unit: str
) -> None:
    summary, history = private_run()
    summary["privacy"]["unit"] = unit
    _, page = render(tmp_path, (summary, history))
    for what, number in PRINTED.items():
        holding = [
            block for block in page.blocks if re.search(rf"(?<![\d.]){re.escape(number)}(?!\d)", block)
        ]
        assert holding, f"{what}: {number} is not printed"
        for block in holding:
            assert f"unit: one {unit}" in block.lower(), block
            assert f"adjacency: {ADJACENCY}" in block, block
            assert "1e−4" in block, block
            assert "PLD accountant" in block, block
            assert "rdp" not in what or "RDP" in block, block
    assert ("not one patient" in page.text) == (unit == "record")


def test_private_report_states_what_officers_need(tmp_path: Path) -> None:
    summary, history = private_run()
    source, page = render(tmp_path, (summary, history))
    assert "NOT PRIVATE" not in source
    for statement in (summary["privacy"]["in_words"], summary["privacy"]["consortium"]["assumption"]):
        assert statement in page.text
    assert summary["privacy"]["outside"]
    for line in [
        *summary["privacy"]["outside"],
        "that a site took part",
        "in which rounds",
        "within a time grid",
    ]:
        assert line in source
    assert "exact, not covered by epsilon" in page.text
    assert "1, 3" in page.text, "the rounds of the site that was left out once"
    assert "no answer" in page.text
    assert "201" in page.text
    assert "402" in page.text, "the declared sizes of all sites"


@pytest.mark.parametrize("leftover", [False, True])
def test_not_private_report_has_the_banner_and_no_epsilon(tmp_path: Path, leftover: bool) -> None:
    summary, history = not_private_run()
    if leftover:
        # Epsilons that a faulty caller left in place are not printed either.
        private, history = private_run()
        summary["privacy"] = private["privacy"] | {
            "private": False,
            "not_private_reason": "privacy.seeded=true",
        }
    summary["references"] = {"local_only": result(0.7777, 0.7878)}
    source, page = render(tmp_path, (summary, history))
    assert '<div class="banner"' in source
    assert any(block.startswith("NOT PRIVATE") for block in page.blocks)
    assert summary["privacy"]["not_private_reason"] in page.text
    assert "epsilon" not in source.lower()
    assert not [number for number in [*PRINTED.values(), "1e−4"] if number in page.text]
    assert "0.778" in page.text


def privately(summary: dict[str, Any], history: list[dict[str, Any]], counts: float) -> None:
    """Turn a run into one with private metrics of this many patients a cell."""
    found = NoisyHistogram(np.full((2, 4), counts), 2.0, bin_edges(4))
    summary["test"] = {
        "release": "private", "covered_by_epsilon": True, "expected_auc_error": 0.0321,
        "sites": {"Cleveland": found.figures()}, **found.all_figures(),
    }  # fmt: skip
    summary["privacy"]["metrics"] = {"release": "private", "expected_auc_error": 0.0321}
    for spent in summary["privacy"]["sites"].values():
        spent |= {"epsilon_training": 1.8181, "epsilon_metrics": 0.9191}
    for entry in history:
        entry |= {"auc": None, "accuracy": None, "site_metrics": {}, "evaluated": False}


def test_private_metrics_are_marked_and_both_parts_of_epsilon_stand_beside_their_claim(
    tmp_path: Path,
) -> None:
    summary, history = private_run()
    privately(summary, history, 30.0)
    source, page = render(tmp_path, (summary, history))
    assert "private, covered by epsilon" in page.text
    assert not re.search(r"\bexact\b", re.sub(r"<style>.*?</style>", "", source, flags=re.DOTALL))
    for part in ("1.82", "0.92"):
        (block,) = [block for block in page.blocks if part in block]
        assert "unit: one patient" in block
        assert "PLD accountant" in block
        assert "both are charged" in block.lower()
    assert "0.032" in page.text
    assert re.search(r"Brier score \d\.\d{3} \d\.\d{3} to \d\.\d{3}", page.text)
    # Nothing was evaluated in between, so that there is no curve of it.
    assert "AUC per round" not in source
    assert "no answer" in page.text
    assert "None" not in page.text


def test_private_figures_within_the_noise_are_too_few(tmp_path: Path) -> None:
    summary, history = private_run()
    privately(summary, history, 0.5)
    _, page = render(tmp_path, (summary, history))
    assert "too few" in page.text
    assert "one class" not in page.text
    assert "Brier" not in page.text


def test_a_run_without_metrics_says_so(tmp_path: Path) -> None:
    summary, history = private_run()
    summary["test"] = {
        "release": "none",
        "covered_by_epsilon": False,
        "auc": None,
        "accuracy": None,
        "sites": {},
    }
    summary["privacy"]["metrics"] = {"release": "none"}
    for entry in history:
        entry |= {"auc": None, "accuracy": None, "site_metrics": {}}
    _, page = render(tmp_path, (summary, history))
    assert "not evaluated (privacy.metrics=none)" in page.text
    assert "exact" not in page.text


def test_names_are_text_never_markup(tmp_path: Path) -> None:
    summary, history = private_run()
    name = '_<script>alert("$1")</script>'
    renamed_summary, renamed_history = rename(summary, name), rename(history, name)
    renamed_summary["task"] = "<b onload=x>"
    renamed_summary["references"] = {"local_only": rename(result(0.7, 0.7), name)}
    source, page = render(tmp_path, (renamed_summary, renamed_history))
    assert "<script" not in source
    assert "<b onload" not in source
    assert name in page.text
    assert len([tag for tag, _ in page.tags if tag == "svg"]) == 3


def rename(values: Any, name: str) -> Any:
    if isinstance(values, dict):
        return {name if key == "Cleveland" else key: rename(value, name) for key, value in values.items()}
    if isinstance(values, list):
        return [rename(value, name) for value in values]
    return name if values == "Cleveland" else values


def test_a_site_with_one_class_has_no_auc(tmp_path: Path) -> None:
    summary, history = private_run()
    summary["test"] |= result(0.8181, 0.8282, other=None)
    for entry in history:
        entry["site_metrics"]["Switzerland"]["auc"] = None
    _, page = render(tmp_path, (summary, history))
    assert re.search(r"Switzerland .* one class 0\.900", page.text)
    assert "None" not in page.text


def test_a_site_that_sent_no_result_is_named(tmp_path: Path) -> None:
    summary, history = private_run()
    del summary["test"]["sites"]["Switzerland"]
    for entry in history:
        entry["dropped"] = {}
        del entry["site_metrics"]["Switzerland"]
    _, page = render(tmp_path, (summary, history))
    assert re.search(r"Switzerland .* no answer no answer", page.text)


@pytest.mark.parametrize(
    ("references", "figures"),
    [
        (None, 2),
        ({"local_only": result(0.7777, 0.7878)}, 3),
        ({"local_only": result(0.7777, 0.7878), "non_private": result(0.9494, 0.9595, other=None)}, 3),
    ],
)
def test_references_are_shown_when_there_are_any(
    tmp_path: Path, references: dict[str, Any] | None, figures: int
) -> None:
    summary, history = private_run()
    summary["references"] = references
    source, page = render(tmp_path, (summary, history))
    assert ("local only" in page.text) == bool(references)
    assert ("no epsilon above covers them" in page.text) == bool(references)
    for reference in (references or {}).values():
        assert f"{reference['auc']:.3f}" in page.text
        assert f"{reference['accuracy']:.3f}" in page.text
    assert ("non-private" in page.text) == ("non_private" in (references or {}))
    labels = [attributes["aria-label"] for _, attributes in page.tags if attributes.get("role") == "img"]
    assert len(labels) == source.count("<svg") == figures
    assert all(label and "chart" in label for label in labels)


def test_the_file_is_self_contained(tmp_path: Path) -> None:
    summary, history = private_run()
    summary["mlflow"] = {"uri": "https://mlflow.hospital.example/a b", "run_id": "4bd1"}
    source, page = render(tmp_path, (summary, history))
    assert "mlflow ui --backend-store-uri &#39;https://mlflow.hospital.example/a b&#39;" in source
    tags = {tag for tag, _ in page.tags}
    assert {"svg", "use", "table"} <= tags
    assert not tags & {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
    loads = ("src", "href", "xlink:href", "action", "srcset", "data", "poster")
    found = [attributes[name] or "" for _, attributes in page.tags for name in loads if name in attributes]
    assert found
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert all(target[0] == "#" and target[1:] in ids for target in found)
    targets = re.findall(r"url\(([^)]*)\)", source)
    assert targets
    assert all(target[0] == "#" and target[1:] in ids for target in targets)
    assert "@import" not in source
    assert "http" not in re.sub(r"https://mlflow.hospital.example", "", source).replace("http-equiv", "")
    assert "default-src 'none'" in source


@pytest.mark.parametrize("before", [None, "the report of yesterday"])
def test_nothing_is_left_behind_when_rendering_fails(tmp_path: Path, before: str | None) -> None:
    path = tmp_path / "report.html"
    if before:
        path.write_text(before)
    failures: list[tuple[Any, type[Exception]]] = [
        (lambda summary: summary.pop("adapter"), jinja2.UndefinedError),
        (lambda summary: summary["privacy"].pop("in_words"), jinja2.UndefinedError),
        (lambda summary: summary["privacy"].update(delta=None), PrivacyError),
        (lambda summary: summary["privacy"].pop("adjacency"), PrivacyError),
    ]
    for damage, error in failures:
        summary, history = private_run()
        damage(summary)
        with pytest.raises(error):
            write_report(summary, history, path)
    assert [file.name for file in tmp_path.iterdir()] == (["report.html"] if before else [])
    assert not before or path.read_text() == before


def test_nothing_is_left_behind_when_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="no space left"):
        write_report(*private_run(), tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


def test_the_summary_is_not_changed_and_the_file_is_reproducible(tmp_path: Path) -> None:
    run = private_run()
    kept = copy.deepcopy(run)
    first, _ = render(tmp_path, run)
    assert run == kept
    assert render(tmp_path, run)[0] == first


def test_a_run_without_rounds_or_target_has_a_report(tmp_path: Path) -> None:
    summary, history = private_run()
    summary["privacy"]["target_epsilon"] = None
    assert "charged for the whole plan" in render(tmp_path, (summary, history))[0]
    assert "nothing to draw" in render(tmp_path, (summary, []))[1].text


def test_matplotlib_is_imported_only_to_draw_and_pyplot_never() -> None:
    program = (
        "import sys; import fedmed.report.html as html; assert 'matplotlib' not in sys.modules;"
        "from pathlib import Path; from tempfile import mkdtemp; sys.path.insert(0, sys.argv[1]);"
        "import test_report; import matplotlib; before = matplotlib.rcParams.copy();"
        "html.write_report(*test_report.private_run(), Path(mkdtemp()) / 'report.html');"
        "assert matplotlib.rcParams.copy() == before; assert 'matplotlib.pyplot' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(Path(__file__).parent)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
