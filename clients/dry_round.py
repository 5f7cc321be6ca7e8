"""One round of training on a site's own data, of which nothing is sent or kept: `fedmed site check` runs it.

No budget is charged, and none has to be: epsilon bounds what those outside learn from what leaves, and here nothing
leaves. The update is forgotten when this process ends; what is printed are the settings and what the round took, for
the person at the site, whose data it is. Neither ledger nor cache is opened. As a script: `python -m clients.dry_round
DIR` prints one JSON object.
"""

import contextlib
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from clients.folder import SiteFolder
from clients.local_models import model_folder, reads_images
from clients.policy import ANY, Policy
from fedmed.config import AdapterConfig, PrivacyConfig, TrainingConfig
from fedmed.data.describe import MAX_CATEGORIES, examine
from fedmed.data.table import blank_cells, read_csv
from fedmed.devices import device_of, in_words
from fedmed.dicom.store import MANIFEST, read_manifest
from fedmed.errors import DataError, FedmedError, ModelError, internal, nearest
from fedmed.model import CnnModelConfig, ImageModelConfig, ModelConfig, TabularModelConfig, TextModelConfig
from fedmed.models.build import build
from fedmed.privacy.plan import PrivacyPlan, declared_delta
from fedmed.records import Instruction
from fedmed.resources import peak_resident
from fedmed.task import ImageTaskConfig, TableTaskConfig, TaskConfig

# Patients in a step, about: enough to time one.
BATCH = 16
STEPS = 2


def dry_round(folder: Path) -> dict[str, Any]:
    """Train a round, forget it; what it took.

    Raises:
        FedmedError: the data, the model or the device cannot be used; the message says what to do.
    """
    from clients import site as local_site

    own = SiteFolder.open(folder)
    device = device_of(own.policy.device)
    task, site, said = task_of(own.policy)
    model = model_of(own.policy, task)
    instruction = _instruction(task, site, model, own.policy)
    arrays = build(task, model, instruction.adapter).initialise(instruction.seed)
    began = time.monotonic()
    here = local_site.Own(split_key=own.split_key, device=own.policy.device)
    local_site.work(instruction, site, arrays, here)
    return {
        "model": model.name, "data": said, "seconds": time.monotonic() - began,
        "peak_mb": peak_resident() / 2**20, **_used(device),
    }  # fmt: skip


def _used(device: torch.device) -> dict[str, Any]:
    """Of an accelerator its name and the most memory that was held there."""
    if device.type == "cpu":
        return {}
    return {"device": in_words(device), "device_peak_mb": torch.cuda.max_memory_allocated(device) / 2**20}


def task_of(policy: Policy) -> tuple[TaskConfig, str, str]:
    """Something to learn from the site's data, the site's name in it, and in words what it is.

    It is read from the records: fit for a round that nobody sees, and for no other.

    Raises:
        DataError: site.yaml names no data, or nothing could be learned from it.
    """
    if policy.data in (None, ANY):
        raise DataError(
            "data: names no table or folder in site.yaml; the site's part is not known before a run"
        )
    data = str(policy.data)
    if (Path(data).expanduser() / MANIFEST).exists():
        return _image_task(data, policy.name)
    return _table_task(data, policy)


def _image_task(data: str, site: str) -> tuple[TaskConfig, str, str]:
    manifest = read_manifest(Path(data).expanduser())
    classes = [name for name in manifest["by_label"] if name]
    if not classes:
        raise DataError(f"{data}: no image has a label; ingest it again with --labels FILE.csv")
    task = ImageTaskConfig(
        path=data, title="dry round", positive=classes[:1], negative=classes[1:] or ["none of the classes"],
        modalities=list(manifest["by_modality"]), declared_sizes={site: max(1, int(manifest["patients"]))},
    )  # fmt: skip
    # A class is a cell of the labels' table: it is not named.
    return task, site, f"one of {len(classes)} classes of images"


def _table_task(data: str, policy: Policy) -> tuple[TaskConfig, str, str]:
    table, _ = read_csv(data)
    patient = policy.patient_column
    if patient is not None and patient not in table.columns:
        raise DataError(f"patient_column={patient}: the table has none; {nearest(patient, table.columns)}")
    site = policy.name
    column = next((name for name in table.columns if (table[name] == site).any()), None)
    if column is None:
        raise DataError(
            f"{data}: no column names the site '{site}', and a run takes the rows that do; add such a column"
        )
    rows = table[table[column] == site]
    for label in table.columns:
        texts = rows[label][~blank_cells(rows[label])].unique()
        if label in (column, patient) or not 2 <= len(texts) <= MAX_CATEGORIES:
            continue
        # A pair such as no and yes speaks for itself; of other values the first one is as good as any.
        for positive in ((), (min(texts),)):
            try:
                proposal = examine(
                    data, site_column=column, label=label, patient_column=patient, positive=positive
                )
            except DataError:
                continue
            declaration = proposal.declaration
            declaration["declared_sizes"] = {site: declaration["declared_sizes"][site]}
            task = TableTaskConfig(**declaration, title="dry round")
            return task, site, f"'{label}' from {len(task.columns)} columns"
    raise DataError(
        f"data={data}: no column has 2 to {MAX_CATEGORIES} values beside others that can be learned from"
    )


def model_of(policy: Policy, task: TaskConfig) -> ModelConfig:
    """A listed model that starts from nothing, else the first listed one that is here and reads such data.

    Raises:
        ModelError: there is none.
    """
    scratch: dict[str, ModelConfig] = (
        {"logistic": TabularModelConfig(), "mlp": TabularModelConfig(hidden=16)}
        if isinstance(task, TableTaskConfig)
        else {"cnn": CnnModelConfig()}
    )
    for name, model in scratch.items():
        if name in policy.scratch_models:
            return model
    for entry in policy.models:
        folder, place = model_folder(entry.id)
        if folder is None or reads_images(folder) is isinstance(task, TableTaskConfig):
            continue
        config = TextModelConfig if isinstance(task, TableTaskConfig) else ImageModelConfig
        return config(**place, sha256=entry.sha256)
    raise ModelError(
        f"no listed model is here that reads such data; list one of {', '.join(scratch)} in scratch_models of "
        "site.yaml, or pull a listed one: fedmed models pull ORG/NAME"
    )


def _instruction(task: TaskConfig, site: str, model: ModelConfig, policy: Policy) -> Instruction:
    privacy = PrivacyConfig(epsilon=None, noise_multiplier=1.0, max_grad_norm=1.0, metrics="none")
    size = task.declared_train(site)
    training = TrainingConfig(steps_per_round=STEPS, sample_rate=min(1.0, BATCH / size), learning_rate=0.1)
    plan = PrivacyPlan(
        unit=task.unit, declared_size=size, sample_rate=training.sample_rate, records_per_patient=1,
        max_grad_norm=1.0, noise_multiplier=1.0, steps_per_round=STEPS, rounds=1,
        delta=declared_delta(task, privacy, site),
    )  # fmt: skip
    return Instruction(
        run_id="dry round", round=1, seed=0, proximal_mu=0.0, task=task, model=model,
        adapter=AdapterConfig(kind="head"), privacy=privacy,
        training=replace(training, physical_batch_size=1 if policy.patients_apart else None),
        plans={site: plan},
    )  # fmt: skip


def gpu() -> str:
    """The accelerator that PyTorch sees, in words; empty where there is none."""
    if not torch.cuda.is_available():
        return ""
    free, total = torch.cuda.mem_get_info()
    return f"{torch.cuda.get_device_name()}, {free / 1e9:.0f} of {total / 1e9:.0f} GB free"


def main() -> None:
    """Print what the round took, or why there was none."""
    found: dict[str, Any] = {}
    # What libraries print may hold anything.
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        try:
            found["gpu"] = gpu()
            found |= dry_round(Path(sys.argv[1]))
        except FedmedError as error:
            found["error"] = "; ".join(error.lines)
        except Exception as error:
            found["error"] = internal(error)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
