"""A scanner changes what it says and nothing else."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fedmed.dicom.synthetic.scanners import Scanner, scanners
from fedmed.dicom.synthetic.write import Syntax
from fedmed.errors import ConfigError

PICTURES = np.random.default_rng(0).integers(0, 256, (5, 28, 30), dtype=np.uint8)


def shown(stored: NDArray[Any], scanner: Scanner) -> NDArray[np.int64]:
    """What a viewer shows, 0 to 255: the window of PS3.3 C.11.2.1.2, then the polarity."""
    centre, width = scanner.window(scanner.bits_stored)
    values = ((stored - (centre - 0.5)) / (width - 1) + 0.5) * 255
    values = np.clip(values, 0, 255)
    return np.rint(255 - values if scanner.photometric == "MONOCHROME1" else values).astype(np.int64)


def scan(scanner: Scanner, shift: float, pictures: NDArray[np.uint8] = PICTURES) -> NDArray[Any]:
    return scanner.scan(pictures, shift=shift, rng=np.random.default_rng(0))


def test_without_shift_a_picture_is_what_it_was() -> None:
    for scanner in scanners(4, 28, 30):
        stored = scan(scanner, 0.0)
        assert stored.max() < 2**scanner.bits_stored
        np.testing.assert_array_equal(shown(stored, scanner), PICTURES)


def test_scanners_differ_in_what_the_demo_is_to_show() -> None:
    made = scanners(4, 64, 64)
    assert {scanner.photometric for scanner in made} == {"MONOCHROME1", "MONOCHROME2"}
    assert {scanner.syntax for scanner in made} == set(Syntax)
    assert len({scanner.bits_stored for scanner in made}) == 4
    assert len({scanner.rows for scanner in made}) == 4
    assert scanners(6, 64, 64)[4:] == made[:2]


def test_shift_brings_the_size_and_in_proportion_the_rest() -> None:
    scanner = Scanner(name="a", manufacturer="b", rows=42, columns=30, gain=0.5, offset=0.1)
    assert scan(scanner, 0.5).shape == (5, 42, 30)
    same_size = Scanner(name="a", manufacturer="b", gain=0.5, offset=0.1)
    whole = shown(scan(same_size, 1.0), same_size)
    half = shown(scan(same_size, 0.5), same_size)
    np.testing.assert_allclose(whole, (PICTURES - 127.5) * 0.5 + 127.5 + 25.5, atol=1)
    np.testing.assert_allclose(half, (PICTURES - 127.5) * 0.75 + 127.5 + 12.75, atol=1)


def test_noise_and_blur_are_as_large_as_declared() -> None:
    flat = np.full((4, 64, 64), 128, np.uint8)
    noisy = Scanner(name="a", manufacturer="b", noise=0.05, bits_stored=16)
    assert scan(noisy, 1.0, flat).std() / 65535 == pytest.approx(0.05, rel=0.05)
    assert scan(noisy, 2.0, flat).std() / 65535 == pytest.approx(0.1, rel=0.05)
    point = np.zeros((1, 65, 65), np.uint8)
    point[0, 32, 32] = 255
    blurred = scan(Scanner(name="a", manufacturer="b", blur=0.04, bits_stored=16), 1.0, point)[0].astype(
        float
    )
    place = np.arange(65) - 32
    spread = np.sqrt((blurred.sum(axis=0) * place**2).sum() / blurred.sum())
    assert spread == pytest.approx(0.04 * 65, rel=0.02)


def test_a_smaller_picture_has_the_means_of_the_larger() -> None:
    small = Scanner(name="a", manufacturer="b", rows=7, columns=10, bits_stored=16)
    assert scan(small, 1.0).mean() / 65535 == pytest.approx(PICTURES.mean() / 255, abs=0.02)


def test_colour_keeps_its_eight_bits() -> None:
    colour = np.random.default_rng(1).integers(0, 256, (3, 28, 30, 3), dtype=np.uint8)
    for scanner in scanners(4, 28, 30):
        np.testing.assert_array_equal(scan(scanner, 0.0, colour), colour)
        assert scan(scanner, 1.0, colour).shape == (3, scanner.rows, scanner.columns, 3)


def test_jpeg_2000_becomes_rle_for_small_images() -> None:
    scanner = Scanner(name="a", manufacturer="b", syntax=Syntax.JPEG_2000)
    assert scanner.syntax_for(28, 64) == Syntax.RLE
    assert scanner.syntax_for(32, 32) == Syntax.JPEG_2000


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"bits_stored": 7}, "scanner 'a': bits_stored=7: expected 8 to 16"),
        ({"photometric": "RGB"}, "scanner 'a': photometric=RGB"),
        ({"levels": (0.8, 0.1)}, "scanner 'a': levels="),
        ({"noise": -1.0}, "scanner 'a': noise=-1.0: expected >= 0"),
        ({"rows": 0}, "scanner 'a': rows, columns=0"),
    ],
)
def test_wrong_values_are_refused(values: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as raised:
        Scanner(name="a", manufacturer="b", **values)
    assert says in str(raised.value)
