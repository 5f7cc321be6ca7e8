"""`fedmed privacy report`, with the commands of this checkout."""

import json
import re
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from clients.folder import LEDGER, SiteFolder
from fedmed.privacy.ledger import Ledger
from tests.fedmed.privacy.test_statement import rounds


@pytest.fixture
def site(tmp_path: Path) -> Path:
    folder = SiteFolder.init(tmp_path / "site", name="mercy")
    ledger = Ledger(folder.path / LEDGER, folder)
    ledger.add_cohort("default", declared_size=1200, by="ada")
    ledger.set_budget("default", epsilon=6.0, delta=1e-5, by="ada", why="board of 3 May")
    rounds(ledger, "demo", "default", promised=4, answered=2)
    ledger.close()
    return folder.path


def test_text_json_and_page_say_the_same(
    command: Any, site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, err = command("privacy", "report", "--site", site, "--json")
    assert (code, err) == (0, "")
    values = json.loads(out)
    spent = values["cohorts"]["default"]["spent"]["epsilon"]
    monkeypatch.setenv("FEDMED_SITE", str(site))
    code, out, err = command("privacy", "report")
    assert (code, err) == (0, "")
    assert re.search(rf"spent +{spent:.2f}", out)
    assert values["head"] in out
    page = tmp_path / "statement.html"
    code, out, err = command("privacy", "report", "--html", page)
    assert (code, out, err) == (0, f"{page}\n", "")
    text = page.read_text("utf-8")
    assert f">{spent:.2f}<" in text
    assert values["head"] in text
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_report_changes_nothing(command: Any, site: Path) -> None:
    first = command("privacy", "report", "--site", site, "--json")
    assert command("privacy", "report", "--site", site, "--json") == first


def test_an_altered_ledger_is_not_reported_on(command: Any, site: Path, tmp_path: Path) -> None:
    connection = sqlite3.connect(site / LEDGER)
    # The chain alone would not show a signature that is not the site's.
    connection.execute("UPDATE entries SET signature = x'00' WHERE number = 3")
    connection.commit()
    connection.close()
    page = tmp_path / "statement.html"
    code, out, err = command("privacy", "report", "--site", site, "--html", page)
    assert (code, out) == (1, "")
    assert "entry 3 is wrong: its signature is not the site's" in err
    assert not page.exists()


def test_a_page_that_cannot_be_written_is_said(command: Any, site: Path, tmp_path: Path) -> None:
    code, out, err = command("privacy", "report", "--site", site, "--html", tmp_path / "no" / "s.html")
    assert (code, out) == (2, "")
    assert "no folder" in err
    code, _, err = command("privacy", "report", "--site", site, "--html", site)
    assert code == 2
    assert "is a folder" in err
    # A name that is too long for any disk.
    code, _, err = command("privacy", "report", "--site", site, "--html", tmp_path / ("s" * 300))
    assert code == 2
    assert "cannot be written" in err


def test_help_shows_examples(command: Any) -> None:
    code, out, _ = command("privacy", "report", "--help")
    assert code == 0
    for option in ("--site", "--html", "--json"):
        assert f"{option} " in out
    assert out.count("fedmed privacy report --site /srv/fedmed") == 3
