"""What a site reads while somebody replaces it."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import clients.site
from fedmed.data.table import locate
from fedmed.errors import DataError
from fedmed.records import Instruction
from tests.fedmed.privacy.test_site import GIVEN_NOISE, SITE, instruction


@pytest.fixture
def asked(tmp_path: Path) -> Instruction:
    """A run on a copy of the table, which is written anew after it was read for the first time."""
    made = instruction("model=logistic", *GIVEN_NOISE)
    path = tmp_path / "table.csv"
    path.write_text(locate(made.task.path or "").read_text())
    return dataclasses.replace(made, task=dataclasses.replace(made.task, path=str(path)))


def test_records_are_never_those_of_one_version_and_labels_those_of_another(
    asked: Instruction, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would make a patient of one's features and another one's label, and train on who is held out."""
    path, read = Path(asked.task.path or ""), clients.site._read
    lines, calls = path.read_text().splitlines(keepends=True), []

    def reading(*given: Any) -> Any:
        found = read(*given)
        calls.append(len(found.labels))
        if len(calls) == 1:
            path.with_suffix(".new").write_text("".join([lines[0], *lines[6:]]))
            os.replace(path.with_suffix(".new"), path)
        return found

    monkeypatch.setattr(clients.site, "_read", reading)
    with pytest.raises(DataError, match="replaced while it was read; ask again"):
        clients.site._parts(asked, SITE, clients.site.Own())
    assert calls[0] > calls[1]
    # Asked again, all is of the new version.
    training, _ = clients.site._parts(asked, SITE, clients.site.Own())
    data = read(asked.task, SITE, asked.seed, None)
    assert np.array_equal(training.batch["features"].numpy(), data.features[data.part(test=False)])
    assert np.array_equal(training.labels.numpy(), data.labels[data.part(test=False)])


@pytest.mark.parametrize(("size", "alone"), [(1, True), (None, False), (8, False)])
def test_patients_who_are_computed_apart_are_prepared_apart(
    asked: Instruction, size: int | None, alone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """privacy.md, rule 6: the frozen layers' rounding in a batch would tell of others as that of trained ones does."""
    training = dataclasses.replace(asked.training, physical_batch_size=size)
    asked, seen = dataclasses.replace(asked, training=training), []
    build = clients.site.build

    def built(*given: Any, **settings: Any) -> Any:
        model = build(*given, **settings)
        prepare = model.prepare
        monkeypatch.setattr(
            model,
            "prepare",
            lambda data, *, cache, alone: (seen.append(alone), prepare(data, cache=cache))[1],
        )
        return model

    monkeypatch.setattr(clients.site, "build", built)
    clients.site._parts(asked, SITE, clients.site.Own())
    assert seen == [alone]
