"""What an officer gets wrong: one line that names the value and the next step. And the help that prevents it."""

import re
from pathlib import Path
from typing import Any

import pytest
import typer

from clients.folder import SiteFolder
from tests.evidence import some

# `{site}` is a site with a cohort, `{elsewhere}` an empty folder.
WRONG: dict[str, str] = {
    "privacy verify": "--site: none named, and this folder is no site; add --site DIR, or set FEDMED_SITE",
    "privacy report --site {elsewhere}": "no site there; make one with: fedmed site init",
    "privacy cohort add new --declared-size 0 --site {site}": "declared_size=0: expected >= 1",
    "privacy cohort ad new": "No such command 'ad'. Did you mean 'add'? See: fedmed privacy cohort --help",
    "privacy budget set defalt --epsilon 3 --why x --site {site}": "did you mean 'default'?",
    "privacy budget set default --epsilon 30 --why x --site {site}": "--epsilon=30.0: expected at most epsilon_total=8",
    "privacy budget set default --epsilon 3 --delta 0 --why x --site {site}": "--delta=0.0: expected above 0",
    "privacy budget set default --epsilon 3 --why= --site {site}": "--why='': expected a reason in words",
    "privacy refund 3f --why x --site {site}": "entry '3f': no reservation has this id",
    "privacy return demo --why x --site {site}": "run 'demo': nothing is promised to it",
    "privacy verify --site {site} --receipts nowhere": "--receipts nowhere: cannot be read",
    "privacy verify --site {site} --receipts {elsewhere}/numbers": "numbers: is no receipts.jsonl of a run",
    "site approve {site} demo --why x": "run 'demo': not asked for here; nobody asked for a run",
    "site refuse {site} demo --why=": "--why='': expected a reason in words",
    "site init nowhere/a --name a": "no folder 'nowhere' to make it in; run: mkdir -p nowhere",
}


@pytest.mark.parametrize("typed", some(WRONG, 2))
def test_a_mistake_is_one_line_that_says_what_to_do(
    typed: str, command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site, elsewhere = SiteFolder.init(tmp_path / "site", name="mercy").path, tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "numbers").write_text('{"site": "mercy", "head": 5}\n')
    command("privacy", "cohort", "add", "default", "--declared-size", 1200, "--site", site)
    before = (site / "ledger.db").read_bytes()
    monkeypatch.chdir(elsewhere)
    code, out, err = command(*typed.format(site=site, elsewhere=elsewhere).split())
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith("error: ")
    assert WRONG[typed] in err
    assert err.count("Did you mean") <= 1
    assert (site / "ledger.db").read_bytes() == before


def leaves(group: typer.core.TyperGroup, *words: str) -> list[tuple[str, ...]]:
    """Every command, and every group of commands."""
    found = [words]
    for name, made in group.commands.items():
        found += leaves(made, *words, name) if isinstance(made, typer.core.TyperGroup) else [(*words, name)]
    return found


def test_every_help_has_an_example_and_no_line_that_is_cut_off(
    command: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    code, whole, _ = command("--help")
    assert code == 0
    # The fixture has put this checkout's commands in place.
    from fedmed.cli.main import build_app

    root = typer.main.get_command(build_app())
    assert isinstance(root, typer.core.TyperGroup)
    shown = leaves(root)
    root.main(["--help"], prog_name="fedmed", standalone_mode=False)
    assert capsys.readouterr().out == whole
    assert len(shown) > 20
    for words in shown:
        # As `main` calls it, of one tree of commands for all.
        assert not root.main([*words, "--help"], prog_name="fedmed", standalone_mode=False)
        out = capsys.readouterr().out
        assert re.search(rf"^ +fedmed {' '.join(words)}", out.split("Examples:")[1], re.MULTILINE), words
        assert "\\[" not in out, words
        assert "...\n" not in out.partition("Commands:")[2], words
