"""What a site needs before it can serve, looked at one by one: `fedmed site check`."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from clients.check_network import check_network
from clients.finding import Finding
from clients.folder import LEDGER, SiteFolder
from clients.local_models import differs, is_elsewhere
from clients.policy import ANY, Policy
from fedmed.data.table import read_csv
from fedmed.dicom.store import MANIFEST, ImageStore
from fedmed.errors import FedmedError, nearest
from fedmed.privacy.reader import read_account

# Python with torch takes about a gigabyte before it has read a record.
LEAST_MEMORY_GB = 2.0
# For the ledger and its stored answers, beside what the activations may take.
LEAST_DISK_GB = 1.0
DRY_SECONDS = 900


def check(folder: Path) -> Iterator[Finding]:
    """Findings, each as soon as it is made; the first that everything else depends on ends them."""
    try:
        site = SiteFolder.open(folder)
    except FedmedError as error:
        for line in error.lines:
            yield Finding("folder", False, line)
        return
    yield Finding("folder", True, f"site '{site.policy.name}', closed to others; its keys are whole")
    yield _tasks(site.policy)
    yield _budget(site)
    yield _data(site.policy)
    yield from _models(site.policy)
    yield _memory()
    yield _disk(site)
    yield from check_network(site)
    yield from _dry_round(folder)


def _tasks(policy: Policy) -> Finding:
    if not policy.tasks:
        return Finding(
            "policy", False, "tasks is empty, so that no run can start; list in site.yaml what may be learned"
        )
    approved = "each run with an approval" if policy.needs_approval else "without asking a person"
    return Finding(
        "policy", True, f"{len(policy.tasks)} task(s) may be learned, {approved}; see: fedmed site policy DIR"
    )


def _budget(site: SiteFolder) -> Finding:
    name = site.policy.cohort
    try:
        account, _ = read_account(site.path / LEDGER)
    except FedmedError as error:
        return Finding("budget", False, str(error))
    cohort = account.cohorts.get(name)
    if cohort is None:
        return Finding(
            "budget", False, f"no cohort '{name}'; fedmed privacy cohort add {name} --declared-size …"
        )
    if cohort.budget is None:
        return Finding(
            "budget", False, f"cohort '{name}' has none; fedmed privacy budget set {name} --epsilon … --why …"
        )
    left = cohort.budget.epsilon - cohort.budget.spent(cohort.charges)
    says = f"cohort '{name}': {max(0.0, left):.2f} of epsilon {cohort.budget.epsilon:g} left"
    return Finding("budget", left > 0, says if left > 0 else f"{says}; every private run will be refused")


def _data(policy: Policy) -> Finding:
    """Whether the data can be read as its readers read it; the counts stay on this screen."""
    if policy.data in (None, ANY):
        return Finding(
            "data",
            False,
            "site.yaml names none, so that each run names its own; set data to a file or folder",
        )
    place = Path(str(policy.data)).expanduser()
    try:
        if (place / MANIFEST).exists():
            manifest = ImageStore.open(place, verify=True).manifest
            warned = "; ".join(["", *manifest["warnings"]])
            says = f"{place}: {manifest['records']} images of {manifest['patients']} patients, as ingested{warned}"
            return Finding("data", True, says)
        table, _ = read_csv(str(place))
    except FedmedError as error:
        return Finding("data", False, str(error))
    column = policy.patient_column
    if column is None:
        return Finding(
            "data", False, "patient_column: none in site.yaml; without it records count as patients"
        )
    if column not in table.columns:
        return Finding(
            "data", False, f"patient_column={column}: not in {place}; {nearest(column, table.columns)}"
        )
    return Finding(
        "data", True, f"{place}: {len(table)} records of {table[column].nunique()} patients by '{column}'"
    )


def _models(policy: Policy) -> Iterator[Finding]:
    for entry in policy.models:
        try:
            wrong = differs(entry.id, entry.sha256)
        except FedmedError as error:
            wrong = str(error)
        if wrong:
            yield Finding("model", False, f"{entry.id}: {wrong}")
        elif is_elsewhere(entry.id):
            yield Finding("model", True, f"{entry.id}: where it is, a run says; its sha256 is checked then")
        else:
            yield Finding("model", True, f"{entry.id}: its weights are the listed ones")
    if not policy.models:
        yield Finding(
            "model", True, f"no pretrained one is listed; from nothing: {', '.join(policy.scratch_models)}"
        )


def _memory() -> Finding:
    found = psutil.virtual_memory()
    free = found.available / 1e9
    says = f"{free:.1f} of {found.total / 1e9:.1f} GB free"
    enough = free >= LEAST_MEMORY_GB
    return Finding("memory", enough, says if enough else f"{says}; expected at least {LEAST_MEMORY_GB:g}")


def _disk(site: SiteFolder) -> Finding:
    free = shutil.disk_usage(site.path).free / 1e9
    kept = site.policy.activations_gb
    says = f"{free:.1f} GB free at {site.path}"
    if free < LEAST_DISK_GB:
        return Finding("disk", False, f"{says}; expected at least {LEAST_DISK_GB:g} for the ledger")
    if free < kept + LEAST_DISK_GB:
        return Finding(
            "disk", False, f"{says}; activations_gb of site.yaml lets {kept:g} be filled: lower it"
        )
    return Finding("disk", True, says)


def _dry_round(folder: Path) -> Iterator[Finding]:
    """Train a round in a process that is then gone: it takes what a run will take, and nothing of it is left."""
    # -P: not what lies in the shell's folder.
    line = [sys.executable, "-P", "-m", "clients.dry_round", str(folder)]
    try:
        ended = subprocess.run(line, capture_output=True, text=True, timeout=DRY_SECONDS, env=os.environ)
        found: dict[str, Any] = json.loads((ended.stdout.splitlines() or [""])[-1])
    except subprocess.TimeoutExpired:
        yield Finding("dry round", False, f"not done after {DRY_SECONDS} s; is the data very large?")
        return
    except ValueError:
        yield Finding(
            "dry round", False, f"its process ended with code {ended.returncode}; was memory short?"
        )
        return
    if "error" in found:
        yield Finding("GPU", True, found.get("gpu") or "none")
        yield Finding("dry round", False, found["error"])
        return
    yield Finding(
        "GPU", True, f"{found['gpu'] or 'none'}; training uses {found.get('device', 'the processor')}"
    )
    took = f"{found['seconds']:.1f} s, {found['peak_mb'] / 1000:.1f} GB at most"
    if "device_peak_mb" in found:
        took += f" and {found['device_peak_mb'] / 1000:.1f} GB of the GPU's"
    yield Finding(
        "dry round", True, f"{found['model']} learned {found['data']}: {took}; nothing was sent or kept"
    )
