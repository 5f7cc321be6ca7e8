import pytest

from fedmed.dicom.deid.dates import MAX_DAYS, days_earlier, shift


def test_a_patient_has_one_shift_and_it_is_never_zero() -> None:
    shifts = [days_earlier(b"k" * 32, str(patient)) for patient in range(20_000)]
    assert shifts == [days_earlier(b"k" * 32, str(patient)) for patient in range(20_000)]
    assert min(shifts) == 1
    assert max(shifts) == MAX_DAYS
    assert sum(days_earlier(b"l" * 32, str(patient)) == shifts[patient] for patient in range(2000)) < 10


@pytest.mark.parametrize(
    ("text", "vr", "expected"),
    [
        ("20240301", "DA", "20240220"),
        ("2024.03.01", "DA", "20240220"),
        ("20240301 ", "DA", "20240220"),
        ("20240301-20240311", "DA", "20240220-20240301"),
        ("20240301-", "DA", "20240220-"),
        ("-20240301", "DA", "-20240220"),
        ("20240301101112.5", "DT", "20240220101112.5"),
        ("20240301101112.5+0130", "DT", "20240220101112.5+0130"),
        ("20240301101112-0500", "DT", "20240220101112-0500"),
        ("20240301-20240311", "DT", "20240220-20240301"),
        ("202403", "DT", "202402"),
        ("2024", "DT", "2023"),
        ("101112.131415", "TM", "101112.131415"),
        ("10", "TM", "10"),
        ("235960", "TM", "235960"),
        ("1011-1112", "TM", "1011-1112"),
        ("", "DA", None),
        ("-", "DA", None),
        ("20240230", "DA", None),
        ("202403", "DA", None),
        ("00010105", "DA", None),
        ("1 March 2024", "DA", None),
        ("20240301Meier", "DA", None),
        ("٢٠٢٤٠٣٠١", "DA", None),
        ("2024-03-01", "DA", None),
        ("20240301101112Meier", "DT", None),
        ("2024030125", "DT", None),
        ("2024130110", "DT", None),
        ("25", "TM", None),
        ("10:11:12", "TM", None),
        ("Meier", "TM", None),
    ],
)
def test_shift_of_ten_days(text: str, vr: str, expected: str | None) -> None:
    assert shift(text, vr, 10) == expected


@pytest.mark.parametrize("text", ["20240301", "202403", "2024", "20240301101112"])
@pytest.mark.parametrize("days", [1, 27, 365, 366, MAX_DAYS])
def test_a_moved_date_is_another_day(text: str, days: int) -> None:
    assert shift(text, "DT", days) != text
