"""The quick way into a file gives exactly what pydicom gives, or leaves the file to pydicom."""

import io
import warnings
from pathlib import Path

import pydicom
import pytest
from pydicom.data import get_testdata_files
from pydicom.dataset import Dataset

from fedmed.dicom.parse import _usual, parse
from fedmed.dicom.reasons import Quarantined, Reason
from tests.conftest import count
from tests.fedmed.dicom.files import write
from tests.fedmed.dicom.mutations import mutations


def raw(dataset: Dataset) -> dict[int, object]:
    return {int(tag): dataset._dict[tag] for tag in dataset._dict}


def same(quick: Dataset, content: bytes) -> None:
    slow = pydicom.dcmread(io.BytesIO(content))
    assert raw(quick) == raw(slow)
    # pydicom has looked at some of these already.
    assert quick.file_meta == slow.file_meta
    assert quick.preamble == slow.preamble
    assert quick._character_set == slow._character_set
    assert quick.original_encoding == slow.original_encoding
    assert quick.original_character_set == slow.original_character_set


def test_every_real_file_is_the_same_or_left_to_pydicom() -> None:
    cut = 0
    for name in sorted(get_testdata_files()):
        if Path(name).is_file():
            content = Path(name).read_bytes()
            quick = _usual(content)
            if quick is not None:
                cut += 1
                same(quick, content)
    assert cut > 60


def test_broken_files_are_the_same_or_left_to_pydicom() -> None:
    cut = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _, content in mutations(count(300, 5000), seed=9):
            quick = _usual(content)
            if quick is not None:
                cut += 1
                same(quick, content)
    assert cut > 60


def test_a_data_set_of_the_quick_way_is_like_any_other(tmp_path: Path) -> None:
    path = write(tmp_path / "a.dcm", SpecificCharacterSet="ISO_IR 100", PatientName="Jö^ß")
    quick = parse(path)
    slow = pydicom.dcmread(path)
    assert quick == slow
    assert (quick.pixel_array == slow.pixel_array).all()


def test_what_is_no_dicom_says_so(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("hello")
    with pytest.raises(Quarantined) as caught:
        parse(tmp_path / "a")
    assert caught.value.reason == Reason.NOT_DICOM
