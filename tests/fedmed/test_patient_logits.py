"""A patient's private score depends on that patient's records alone, to the last bit."""

import dataclasses

import numpy as np
import pytest

from fedmed.compose import compose
from fedmed.data.readers import made_up as made_up_records
from fedmed.models.build import build
from fedmed.training import local_parts, logits, patient_logits


@pytest.mark.parametrize("model", ["logistic", "mlp"])
def test_taking_a_patient_out_moves_no_other_score(model: str) -> None:
    """Batched arithmetic gives the same up to rounding, and rounding could move a score over the edge of a bin."""
    config = compose(["task=heart", f"model={model}", "tracking=none", "adapter=full"])
    classifier = build(config.task, config.model, config.adapter)
    made_up = dataclasses.replace(made_up_records(config.task, 90), patients=np.arange(90) // 2)
    data, _ = local_parts(classifier.prepare(made_up), made_up)
    arrays = {name: values + 0.1 for name, values in classifier.initialise(0).items()}
    whole = patient_logits(classifier, data, arrays)
    assert whole == pytest.approx(logits(classifier, data, arrays), abs=1e-5)
    for out in (0, 17, 44):
        kept = dataclasses.replace(data, records_of=data.records_of[:out] + data.records_of[out + 1 :])
        less = patient_logits(classifier, kept, arrays)
        for records in kept.records_of:
            assert less[records].tobytes() == whole[records].tobytes()
