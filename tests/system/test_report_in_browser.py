"""The HTML report of a real run, as Chromium draws it."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

CHROMIUM = [
    "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
]  # fmt: skip


def report(folder: Path, *settings: str) -> Path:
    """The report of a small real run."""
    command = [sys.executable, "-c", "from fedmed.cli.main import main; main()", "run", "model=logistic",
               "tracking=none", "rounds=3", f"run_dir={folder}", *settings]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return folder / "report.html"


def chromium(tmp_path: Path, page: Path, *arguments: str) -> str:
    command = [*CHROMIUM, f"--user-data-dir={tmp_path / 'profile'}", *arguments, page.resolve().as_uri()]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    return done.stdout


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("runs")
    return {"private": report(root / "private", "reference=true"), "off": report(root / "off", "privacy=off")}


@pytest.mark.parametrize("width", [500, 1100])
@pytest.mark.parametrize("kind", ["private", "off"])
def test_the_page_is_drawn_at_phone_and_desk_width(
    kind: str, width: int, pages: dict[str, Path], tmp_path: Path
) -> None:
    picture = tmp_path / "page.png"
    chromium(tmp_path, pages[kind], f"--screenshot={picture}", f"--window-size={width},3000")
    pixels = imread(picture)[..., :3]
    assert pixels.shape[1] == width
    # Text and plots: many rows differ from the background, and the right edge is margin, not cut-off text.
    busy = (np.abs(pixels - pixels[-1, -1]).max(axis=2) > 0.2).any(axis=1)
    assert busy.sum() > 500
    assert np.abs(pixels[:, -2:] - pixels[0, -1]).max() < 0.2


def test_the_drawn_text_says_what_was_spent_or_that_nothing_is_private(
    pages: dict[str, Path], tmp_path: Path
) -> None:
    text = {kind: chromium(tmp_path, page, "--dump-dom") for kind, page in pages.items()}
    assert "NOT PRIVATE" not in text["private"]
    assert "add or remove one patient with all of its records" in text["private"]
    assert "NOT PRIVATE" in text["off"]
    assert "not covered by epsilon" in text["private"]
    for page in text.values():
        assert len(re.findall(r"<svg|<img", page)) >= 1
