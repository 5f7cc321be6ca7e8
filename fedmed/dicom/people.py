"""Made-up people and their visits."""

import datetime
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FAMILIES = ["Abel", "Arden", "Birch", "Brandt", "Castell", "Corr", "Dahl", "Drayton", "Eklund", "Ferro", "Garrow", "Hale", "Ibarra", "Jansen", "Kestrel", "Lind", "Marlow", "Novak", "Okafor", "Pell", "Quist", "Rowan", "Sato", "Thorne", "Ueda", "Varga", "Wren", "Yilmaz", "Zeller"]
GIVEN = {
    "F": ["Ada", "Bea", "Clara", "Dora", "Edda", "Freya", "Greta", "Hana", "Ines", "Jana", "Kira", "Lena", "Mina", "Nora", "Olga", "Paula"],
    "M": ["Abe", "Boris", "Carl", "Dan", "Emil", "Finn", "Georg", "Hugo", "Ivan", "Jon", "Karl", "Leo", "Max", "Nils", "Otto", "Paul"],
}
FIRST_DAY = datetime.date(2016, 1, 4)
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
    for image, patient in enumerate(patients):
        if image == 0 or patient != patients[image - 1]:
            sex = "FM"[rng.integers(2)]
            born = FIRST_DAY - datetime.timedelta(days=int(rng.integers(18 * 366, 90 * 365)))
            name = f"{FAMILIES[rng.integers(len(FAMILIES))]}^{GIVEN[sex][rng.integers(len(GIVEN[sex]))]}"
            number = f"{hospital + 1}{numbers[image]:06d}"
            study, instance, day = (visits[-1].study if visits else 0) + 1, 1, int(rng.integers(DAYS))
        elif rng.random() < 0.5:
            instance += 1
        else:
            study, instance, day = study + 1, 1, day + int(rng.integers(1, 400))
        minutes = 8 * 60 + int(rng.integers(0, 600)) if instance == 1 else minutes + 2
        time = datetime.datetime.combine(FIRST_DAY, datetime.time()) + datetime.timedelta(
            days=day, minutes=minutes
        )
        visits.append(
            Visit(
                patient_id=number,
                patient_name=name,
                birth_date=born,
                sex=sex,
                study=study,
                instance=instance,
                time=time,
            )  # fmt: skip
        )
    return visits
