"""The sheet shows what was read, large enough to be seen, whatever labels are called."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedmed.dicom.contact_sheet import CAPTION, COLUMNS, GAP, LARGEST, SIDE, contact_sheet
from fedmed.dicom.store import StoredImage


class Ready:
    """A record that needs no files."""

    def __init__(self, pixels: np.ndarray, label: str = "") -> None:
        self.image = StoredImage(pixels=pixels, patient="0" * 32, label=label, modality="CT")

    def load(self) -> StoredImage:
        return self.image


def grey(*shape: int) -> np.ndarray:
    return np.full(shape, 0x8000, np.uint16)


def sheet(*images: Ready) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(contact_sheet(images))))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("shape", "side"), [((1, 16, 16), 112), ((1, 3, 3), 111), ((1, 100, 100), 100), ((1, 500, 500), 112)]
)
def test_images_are_as_large_as_their_place_allows(shape: tuple[int, ...], side: int) -> None:
    page = sheet(Ready(grey(*shape)))
    shown = (page[GAP : GAP + SIDE, GAP : GAP + SIDE] == 0x80).all(axis=-1)
    assert shown.sum() == side * side


def test_of_a_volume_the_middle_is_shown_and_of_colours_all() -> None:
    volume, colour = grey(3, 112, 112), grey(1, 112, 112, 3)
    volume[1] = 0xFFFF
    colour[..., 0] = 0
    page = sheet(Ready(volume), Ready(colour))
    assert page[GAP + 50, GAP + 50].tolist() == [255, 255, 255]
    assert page[GAP + 50, 2 * GAP + SIDE + 50].tolist() == [0, 128, 128]


@pytest.mark.parametrize("label", ["", "x" * 3000, "正常", "a\nb\x1b[2J", "Erguß – größer", "\ud800"])
def test_any_label_is_drawn_and_stays_below_its_image(label: str) -> None:
    page = sheet(Ready(grey(1, 112, 112), label), Ready(grey(1, 112, 112), ""))
    background = page[0, 0]
    assert page.shape == (SIDE + CAPTION + 2 * GAP, 2 * SIDE + 3 * GAP, 3)
    assert (page[:, GAP + SIDE + 1 : 2 * GAP + SIDE] == background).all()
    assert (page[GAP + SIDE :, GAP : GAP + SIDE] != background).any()


def test_many_records_make_one_page(tmp_path: Path) -> None:
    page = sheet(*[Ready(grey(1, 8, 8), str(number)) for number in range(500)])
    assert page.shape[0] == LARGEST // COLUMNS * (SIDE + CAPTION + GAP) + GAP
    assert not list(tmp_path.iterdir())
