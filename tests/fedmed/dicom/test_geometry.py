"""Series to volumes: order, spacing, gaps and repeats come from geometry alone."""

import random
from dataclasses import replace

import numpy as np
import pytest
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from fedmed.dicom.image.geometry import Assembly, Slice, assemble
from fedmed.dicom.image.slices import dicom_slices
from fedmed.dicom.reasons import Reason

AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
SAGITTAL = (0.0, 1.0, 0.0, 0.0, 0.0, -1.0)


def _stack(
    count: int, *, start: int = 0, step: float = 2.5, orientation=AXIAL, shear: float = 0.0, **changes
):
    row, column = np.asarray(orientation).reshape(2, 3)
    normal = np.cross(row, column)
    return [
        Slice(
            **{
                "index": start + number,
                "position": tuple(number * step * normal + number * shear * column + (-100.0, 40.0, 7.0)),
                "orientation": orientation,
                "rows": 512,
                "columns": 512,
                "spacing": (0.7, 0.7),
                "acquisition": (1.0, None),
                **changes,
            }
        )
        for number in range(count)
    ]


def _oblique(seed: int) -> tuple[float, ...]:
    matrix, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    return tuple(matrix[:, 0]) + tuple(matrix[:, 1])


def _everything(assembly: Assembly) -> list[int]:
    """Every index that came out, wherever it is."""
    return sorted(
        [i for volume in assembly.volumes for i in volume.indices] + [i for i, _ in assembly.leftovers]
    )


@pytest.mark.parametrize("seed", range(8))
def test_an_oblique_stack_comes_out_in_order_with_its_spacing_however_it_goes_in(seed):
    slices = _stack(20, step=1.25, orientation=_oblique(seed))
    random.Random(seed).shuffle(slices)
    assembly = assemble(slices)
    (volume,) = assembly.volumes
    assert volume.indices == tuple(range(20))
    assert volume.slice_spacing == pytest.approx(1.25)
    assert (volume.warnings, assembly.leftovers, assembly.warnings) == ((), (), ())


@pytest.mark.parametrize("seed", range(20))
def test_the_order_of_the_input_changes_nothing_and_no_slice_is_lost(seed):
    generator = random.Random(seed)
    slices = (
        _stack(9) + _stack(9, start=9, acquisition=(1.0, 20.0)) + _stack(3, start=18, orientation=SAGITTAL)
    )
    slices += _stack(4, start=21, rows=256) + _stack(2, start=25, position=None)
    slices = [one for one in slices if generator.random() < 0.9]
    expected = assemble(slices)
    generator.shuffle(slices)
    assert assemble(slices) == expected
    assert _everything(expected) == sorted(one.index for one in slices)


def test_instance_numbers_play_no_part():
    """`index` stands for any numbering: reversed, it reverses the indices and not the places."""
    slices = [replace(one, index=9 - one.index) for one in _stack(10)]
    (volume,) = assemble(slices).volumes
    assert volume.indices == tuple(range(9, -1, -1))
    (folder,) = assemble([replace(one, index=(one.index * 7) % 10) for one in _stack(10)]).volumes
    assert folder.indices == tuple((number * 7) % 10 for number in range(10))


def test_a_missing_slice_is_counted_and_the_spacing_stays():
    slices = _stack(20)
    del slices[7]
    (volume,) = assemble(slices).volumes
    assert volume.slice_spacing == pytest.approx(2.5)
    assert volume.warnings == ("1 slice missing in 1 gap of a volume of 19",)
    del slices[12:14]
    assert assemble(slices).volumes[0].warnings == ("3 slices missing in 2 gaps of a volume of 17",)


def test_uneven_distances_are_reported_and_small_ones_are_not():
    slices = _stack(10)
    moved = replace(slices[4], position=(-100.0, 40.0, slices[4].position[2] + 0.8))
    assert assemble([*slices[:4], moved, *slices[5:]]).volumes[0].warnings == (
        "2 of 9 distances between slices irregular",
    )
    jittered = [
        replace(one, position=(*one.position[:2], one.position[2] + 0.03 * (-1) ** one.index))
        for one in slices
    ]
    assert assemble(jittered).volumes[0].warnings == ()


def test_localisers_and_axial_slices_become_separate_volumes():
    assembly = assemble(_stack(30) + _stack(2, start=30, orientation=SAGITTAL, step=10))
    assert [len(volume.indices) for volume in assembly.volumes] == [30, 2]
    assert assembly.warnings == ("2 orientations in one series",)
    assert assembly.leftovers == ()


def test_other_grids_become_separate_volumes():
    assembly = assemble(_stack(5) + _stack(5, start=5, rows=256) + _stack(5, start=10, spacing=(0.8, 0.7)))
    assert [len(volume.indices) for volume in assembly.volumes] == [5, 5, 5]
    assert assembly.warnings == ("3 grids of rows, columns and spacing in one series",)


def test_two_interleaved_echoes_become_two_volumes():
    slices = []
    for number, one in enumerate(_stack(12)):
        slices += [
            replace(one, index=2 * number, acquisition=(1.0, 10.0)),
            replace(one, index=2 * number + 1, acquisition=(1.0, 80.0)),
        ]
    assembly = assemble(slices)
    assert [volume.indices for volume in assembly.volumes] == [tuple(range(0, 24, 2)), tuple(range(1, 24, 2))]
    assert (assembly.leftovers, assembly.warnings) == ((), ())


def test_two_parts_of_the_key_split_together_where_one_does_not():
    slices = [
        replace(
            one,
            index=100 * echo + 10 * phase + one.index,
            acquisition=(float(one.index), 10.0 * echo, 1.0 * phase),
        )
        for one in _stack(6)
        for echo in range(2)
        for phase in range(3)
    ]
    assembly = assemble(slices)
    assert [len(volume.indices) for volume in assembly.volumes] == [6] * 6
    assert assembly.leftovers == ()


def test_where_nothing_tells_repeats_apart_the_first_stays():
    slices = _stack(6) + [replace(one, index=one.index + 6) for one in _stack(6)[2:4]]
    assembly = assemble(slices)
    assert assembly.volumes[0].indices == tuple(range(6))
    assert assembly.leftovers == ((8, Reason.SLICE_REPEATED), (9, Reason.SLICE_REPEATED))
    assert assembly.warnings == ("2 slices left out: slice-repeated",)


def test_uneven_acquisitions_are_not_split():
    """One slice of the second echo is missing: no even stacks, so the first of each place stays."""
    slices = _stack(6, acquisition=(10.0,)) + _stack(6, start=6, acquisition=(80.0,))[:-1]
    assembly = assemble(slices)
    assert [volume.indices for volume in assembly.volumes] == [tuple(range(6))]
    assert len(assembly.leftovers) == 5


def test_gantry_tilt_is_noted_and_spacing_is_along_the_normal():
    (volume,) = assemble(_stack(10, step=2.5, shear=2.5 * np.tan(np.radians(20)))).volumes
    assert volume.slice_spacing == pytest.approx(2.5)
    assert volume.warnings == ("stack of 10 slices sheared by 20 degrees",)


@pytest.mark.parametrize(
    "damage",
    [
        {"position": None},
        {"orientation": None},
        {"spacing": None},
        {"position": (0.0, float("nan"), 0.0)},
        {"position": (0.0, 0.0)},
        {"orientation": (0.0,) * 6},
        {"orientation": (1.0, 0.0, 0.0, 1.0, 0.0, 0.0)},
        {"spacing": (0.0, 1.0)},
        {"spacing": (1.0, float("inf"))},
    ],
)
def test_a_slice_without_usable_geometry_is_left_out(damage):
    slices = _stack(5)
    slices[3] = replace(slices[3], **damage)
    assembly = assemble(slices)
    assert assembly.leftovers == ((3, Reason.GEOMETRY_MISSING),)
    assert assembly.volumes[0].indices == (0, 1, 2, 4)
    assert assembly.warnings == ("1 slice left out: geometry-missing",)


def test_one_slice_and_none():
    assert assemble([]) == Assembly(volumes=(), leftovers=(), warnings=())
    (volume,) = assemble(_stack(1)).volumes
    assert (volume.indices, volume.slice_spacing, volume.warnings) == ((0,), None, ())


def test_warnings_hold_words_and_counts_only():
    slices = (
        _stack(8, shear=1.0) + _stack(4, start=8, orientation=SAGITTAL) + _stack(1, start=12, position=None)
    )
    del slices[3]
    assembly = assemble(slices)
    sentences = [*assembly.warnings, *(text for volume in assembly.volumes for text in volume.warnings)]
    assert len(sentences) >= 4
    for sentence in sentences:
        assert "." not in sentence, "positions and UIDs have points"
        assert all(len(word) <= 3 for word in sentence.split() if word.isdigit())


def test_a_real_slice_is_read_from_its_file():
    dataset = get_testdata_file("CT_small.dcm", read=True)
    (one,) = dicom_slices(dataset, first_index=7)
    assert one.index == 7
    assert one.position == tuple(float(value) for value in dataset.ImagePositionPatient)
    assert one.orientation == tuple(float(value) for value in dataset.ImageOrientationPatient)
    assert (one.rows, one.columns) == (128, 128)
    assert one.spacing == (0.661468, 0.661468)
    assert one.acquisition[0] == float(dataset.AcquisitionNumber)


def test_frames_of_an_enhanced_file_have_their_own_places():
    dataset = get_testdata_file("eCT_Supplemental.dcm", read=True)
    slices = dicom_slices(dataset)
    places = [tuple(float(v) for v in group.PlanePositionSequence[0].ImagePositionPatient)
              for group in dataset.PerFrameFunctionalGroupsSequence]  # fmt: skip
    assert [one.position for one in slices] == places
    assert [one.spacing for one in slices] == [(0.388672, 0.388672)] * 2
    assert len(assemble(slices).volumes) == 1


def test_shared_groups_hold_for_every_frame():
    dataset, shared, plane = Dataset(), Dataset(), Dataset()
    plane.ImageOrientationPatient = list(AXIAL)
    shared.PlaneOrientationSequence = Sequence([plane])
    measures = Dataset()
    measures.PixelSpacing = [2, 2]
    shared.PixelMeasuresSequence = Sequence([measures])
    dataset.SharedFunctionalGroupsSequence = Sequence([shared])
    frames = []
    for number in range(3):
        frame, position, diffusion = Dataset(), Dataset(), Dataset()
        position.ImagePositionPatient = [0, 0, 5 * number]
        frame.PlanePositionSequence = Sequence([position])
        diffusion.DiffusionBValue = 1000.0
        frame.MRDiffusionSequence = Sequence([diffusion])
        frames.append(frame)
    dataset.PerFrameFunctionalGroupsSequence = Sequence(frames)
    dataset.NumberOfFrames, dataset.Rows, dataset.Columns = 3, 4, 4
    slices = dicom_slices(dataset)
    assert [one.acquisition[3] for one in slices] == [1000.0] * 3
    (volume,) = assemble(slices).volumes
    assert (volume.indices, volume.slice_spacing) == ((0, 1, 2), 5.0)


def test_a_plain_clip_and_damaged_elements_have_no_place():
    dataset = Dataset()
    dataset.NumberOfFrames, dataset.Rows, dataset.Columns = 3, 4, 4
    dataset.ImagePositionPatient = [0, 0, 0]
    dataset.ImageOrientationPatient = list(AXIAL)
    dataset.PixelSpacing = [1, 1]
    assert {reason for _, reason in assemble(dicom_slices(dataset)).leftovers} == {Reason.GEOMETRY_MISSING}
    dataset.NumberOfFrames = 1
    dataset.ImagePositionPatient = [0, 0]
    assert dicom_slices(dataset)[0].position is None
