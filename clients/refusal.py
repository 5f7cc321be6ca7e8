"""The rules of a site's policy, and what is said when one is broken."""

from enum import StrEnum

from fedmed.errors import FedmedError


class Rule(StrEnum):
    """The code of each rule, in the order of the check. Those from `METRICS` on stand outside `Policy.check`."""

    # The task's title or digest is not on the site's list.
    TASK = "task"
    # The site has not said which table runs read, and the task is not fixed by its digest.
    DATA = "data"
    # The run would take another column for the patient's, or none.
    PATIENT_COLUMN = "patient_column"
    # The run's seed would choose who is held out, and one patient more or less would move all others.
    SPLIT = "split"
    # The model's id and sha256, or the tabular kind, is not on the site's list.
    MODEL = "model"
    # The adapter's kind is not on the site's list.
    ADAPTER = "adapter"
    # The site's plan is missing, or is not the one that the run declares.
    PLAN = "plan"
    # The run is NOT PRIVATE: no noise, seeded noise, or a declaration read from the data.
    NON_PRIVATE = "non_private"
    # The declared number of training patients is too small.
    DECLARED_SIZE = "declared_size"
    NOISE_MULTIPLIER = "noise_multiplier"
    MAX_GRAD_NORM = "max_grad_norm"
    SAMPLE_RATE = "sample_rate"
    # Optimizer steps over the whole run.
    STEPS = "steps"
    RECORDS_PER_PATIENT = "records_per_patient"
    DELTA = "delta"
    # Of the whole run, at its delta.
    EPSILON = "epsilon"
    # A metric would say more than the site lets out.
    METRICS = "metrics"
    # The site wants a person's yes for every run.
    APPROVAL = "needs_approval"
    # The cohort's budget does not hold the whole run beside what was spent and promised.
    BUDGET = "budget"


class Refusal(FedmedError):
    """The site's policy does not allow what was asked.

    The text holds the rule, the asked and the allowed value, and nothing else about the site: it may be sent.
    """

    def __init__(self, rule: Rule, *, asked: str, allowed: str) -> None:
        super().__init__(f"the site's policy refuses: {rule}: asked {asked}, allowed {allowed}")
        self.rule = rule
        self.asked = asked
        self.allowed = allowed
