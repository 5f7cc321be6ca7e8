"""The officer's page: a sibling of the run's report, in which every figure is one of the statement's."""

import re
from pathlib import Path
from typing import Any

import pytest

from fedmed.privacy.ledger import Ledger
from fedmed.privacy.statement import statement
from fedmed.report.html import write_report
from fedmed.report.officer import write_statement
from fedmed.report.officer_text import as_text
from tests.fedmed.privacy.test_statement import STEPS, empty, filled, rounds
from tests.fedmed.test_report import Page, private_run

EVIL = '<script>alert("1")</script>'


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return empty(tmp_path / "ledger.db")


def render(ledger: Ledger, folder: Path) -> tuple[str, Page, dict[str, Any]]:
    values = statement(ledger.entries())
    write_statement(values, folder / "statement.html")
    source = (folder / "statement.html").read_text("utf-8")
    return source, Page(source), values


def numbers(values: Any) -> set[float]:
    """Every number in a mapping, however deep."""
    if isinstance(values, dict):
        return set().union(*map(numbers, values.values()))
    if isinstance(values, list):
        return set().union(*map(numbers, values))
    return {float(values)} if isinstance(values, int | float) and not isinstance(values, bool) else set()


def test_every_figure_on_the_page_stands_in_the_statement(ledger: Ledger, tmp_path: Path) -> None:
    source, _, values = render(filled(ledger), tmp_path)
    shown = re.sub(r"<svg.*?</svg>|<style>.*?</style>", "", source, flags=re.DOTALL)
    figures = re.findall(r"(?<![\d.])\d+\.\d\d(?![\d%])", re.sub(r"<[^>]*>", " ", shown))
    assert len(figures) > 10
    assert {float(figure) for figure in figures} <= numbers(values)
    for cell in re.findall(r"<td>(\d+)</td>", shown):
        assert float(cell) in numbers(values)
    in_text = re.findall(r"(?<![\d.])\d+\.\d\d(?![\d%])", as_text(values))
    assert len(in_text) > 10
    assert {float(figure) for figure in in_text} <= numbers(values)


def test_every_epsilon_has_its_claim_beside_it(ledger: Ledger, tmp_path: Path) -> None:
    source, page, values = render(filled(ledger), tmp_path)
    for cohort in values["cohorts"].values():
        claim = f"unit: one patient; adjacency: {values['adjacency']}; delta 1e−5; {cohort['accountant']}"
        assert sum(claim in block for block in page.blocks) >= 2, "beside the tiles and below the figure"
        assert cohort["spent_and_promised"]["belief"] in page.text
        assert f"{cohort['left']:.2f}" in source
    (table,) = [block for block in page.blocks if "refunded epsilon" in block]
    for part in ("unit: one patient", "PLD accountant", "1e−5", "add or remove one patient"):
        assert part in table


def test_the_page_holds_what_an_officer_signs(ledger: Ledger, tmp_path: Path) -> None:
    _, page, values = render(filled(ledger), tmp_path)
    end = page.text[page.text.index("This page describes") :]
    assert values["head"] in end
    for line in ("Privacy officer, name", "Date", "Signature"):
        assert line in end
    for fact in (
        "ada, ",
        "board of 3 May",
        "second study",
        "power cut",
        "vote 12",
        "no vote",
        "exact metrics",
    ):
        assert fact in page.text
    for attempt in values["unfinished"]:
        assert attempt["entry"] in page.text
    assert "None" not in page.text


def test_it_loads_nothing_runs_nothing_and_looks_like_the_run_s_report(
    ledger: Ledger, tmp_path: Path
) -> None:
    source, page, _ = render(filled(ledger), tmp_path)
    tags = {tag for tag, _ in page.tags}
    assert {"svg", "table"} <= tags
    assert not tags & {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
    loads = ("src", "href", "xlink:href", "action", "srcset", "data", "poster")
    found = [attributes[name] or "" for _, attributes in page.tags for name in loads if name in attributes]
    assert all(target.startswith("#") for target in found)
    assert "http" not in re.sub(r'http-equiv="', "", source)
    assert "default-src 'none'" in source
    write_report(*private_run(), tmp_path / "report.html")
    style = re.search(r"<style>.*?</style>", source, re.DOTALL)
    assert style is not None
    assert style[0] in (tmp_path / "report.html").read_text("utf-8")
    assert "prefers-color-scheme: dark" in style[0]


def test_names_are_text_never_markup(ledger: Ledger, tmp_path: Path) -> None:
    ledger.add_cohort(EVIL, declared_size=500, by=EVIL)
    ledger.set_budget(EVIL, epsilon=4.0, delta=None, by=EVIL, why=EVIL)
    ledger.request(f"a {EVIL}", what={"digest": "d"})
    ledger.decide(f"b {EVIL}", approved=False, by=EVIL, why=EVIL, what={"digest": "d"})
    rounds(ledger, EVIL, EVIL, promised=2, answered=1)
    ledger.outside(EVIL, what=EVIL, released=b"1", approval=EVIL)
    ledger.end(EVIL, by=EVIL, why=EVIL)
    source, page, _ = render(ledger, tmp_path)
    assert "<script" not in source
    assert page.text.count(EVIL) > 10


def test_a_name_steers_no_terminal(ledger: Ledger) -> None:
    ledger.request("r\x1b[31m\nnext: all is well", what={"digest": "d"})
    ledger.decide("r\x1b[31m\nnext: all is well", approved=True, by="ada\r", why="\x07", what={"digest": "d"})
    text = as_text(statement(ledger.entries()))
    assert "approved: r?[31m?next: all is well" in text
    assert not [letter for letter in text if not letter.isprintable() and letter != "\n"]


def test_a_thousand_releases_are_few_lines(ledger: Ledger, tmp_path: Path) -> None:
    ledger.add_cohort("chest", declared_size=500, by="ada")
    ledger.set_budget("chest", epsilon=8.0, delta=None, by="ada", why="w")
    rounds(ledger, "short", "chest", promised=3, answered=3, noise=50.0)
    few = render(ledger, tmp_path)[0]
    rounds(ledger, "long", "chest", promised=300, answered=300, noise=50.0)
    source, page, values = render(ledger, tmp_path)
    assert values["released"][1]["count"] == 300
    assert "1–300" in page.text
    assert source.count("<tr>") == few.count("<tr>") + 2
    assert len(as_text(values).splitlines()) < 40


def test_a_ledger_in_which_little_stands_makes_a_page(ledger: Ledger, tmp_path: Path) -> None:
    """Without a cohort, without a budget, without a run: each says so, and what to do next."""
    for (step, command), said in zip(
        STEPS, ("No cohort is named", "No budget is set", "No run was promised"), strict=True
    ):
        step(ledger)
        source, page, values = render(ledger, tmp_path)
        assert said in page.text
        assert command in page.text
        assert command in as_text(values)
        assert ("<svg" in source) == (values["cohorts"] != {} and command.startswith("fedmed site"))
