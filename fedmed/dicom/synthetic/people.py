"""Made-up people and their visits."""

import datetime
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

FAMILIES = (
    "Abel", "Arden", "Birch", "Brandt", "Castell", "Corr", "Dahl", "Drayton", "Eklund", "Ferro", "Garrow", "Hale",
    "Ibarra", "Jansen", "Kestrel", "Lind", "Marlow", "Novak", "Okafor", "Pell", "Quist", "Rowan", "Sato", "Thorne",
)  # fmt: skip
GIVEN = {
    "F": ("Ada", "Bea", "Clara", "Dora", "Edda", "Freya", "Greta", "Hana", "Ines", "Jana", "Kira", "Lena", "Nora"),
    "M": ("Abe", "Boris", "Carl", "Dan", "Emil", "Finn", "Georg", "Hugo", "Ivan", "Jon", "Leo", "Max", "Nils"),
}  # fmt: skip
FIRST_DAY = datetime.datetime(2016, 1, 4)
DAYS = 2500


@dataclass(frozen=True, kw_only=True)
class Visit:
    """One image: whose, and when and in which study it was taken."""

    patient_id: str
    patient_name: str
    birth_date: datetime.date
    sex: str
    # Its number in the hospital, from 1, and the image's number in it, from 1.
    study: int
    instance: int
    time: datetime.datetime

    @property
    def folder(self) -> str:
        """Where an archive keeps it: year, month, study, series."""
        return f"{self.time:%Y}/{self.time:%m}/ST{self.study:06d}/SE0001"


def draw_visits(patients: NDArray[np.int64], *, hospital: int, rng: np.random.Generator) -> list[Visit]:
    """A visit for each image. `patients` (images,) has equal numbers side by side.

    A patient's next image belongs to the same study as often as to a later one.
    """
    visits: list[Visit] = []
    numbers = rng.permutation(90_000 + 2 * len(patients))
    study = 0
    for image, patient in enumerate(patients):
        if image == 0 or patient != patients[image - 1]:
            person = _draw_person(rng) | {"patient_id": f"{hospital + 1}{numbers[image]:06d}"}
            study, instance, time = study + 1, 1, _draw_time(rng, FIRST_DAY, days=DAYS)
        elif rng.random() < 0.5:
            instance, time = instance + 1, time + datetime.timedelta(minutes=2)
        else:
            study, instance, time = study + 1, 1, _draw_time(rng, time + datetime.timedelta(days=1), days=400)
        visits.append(Visit(**person, study=study, instance=instance, time=time))
    return visits


def _draw_person(rng: np.random.Generator) -> dict[str, Any]:
    sex = "FM"[rng.integers(2)]
    born = FIRST_DAY - datetime.timedelta(days=int(rng.integers(18 * 366, 90 * 365)))
    name = f"{FAMILIES[rng.integers(len(FAMILIES))]}^{GIVEN[sex][rng.integers(len(GIVEN[sex]))]}"
    return {"patient_name": name, "birth_date": born.date(), "sex": sex}


def _draw_time(rng: np.random.Generator, first: datetime.datetime, *, days: int) -> datetime.datetime:
    """Between 8 and 18 hours of one of the `days` from `first` on."""
    day = datetime.datetime.combine(first.date(), datetime.time())
    return day + datetime.timedelta(days=int(rng.integers(days)), minutes=int(rng.integers(8 * 60, 18 * 60)))
