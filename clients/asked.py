"""What an instruction asks for, in the words in which a site's policy answers. Declared values only."""

import hashlib
import json
import math
from typing import TYPE_CHECKING

from fedmed.errors import PrivacyError

if TYPE_CHECKING:
    from fedmed.privacy.plan import PrivacyPlan
    from fedmed.records import Instruction
    from fedmed.task import TaskConfig

# What a task's digest begins with.
DIGEST = "sha256:"


def task_digest(task: "TaskConfig") -> str:
    """`sha256:` and 64 hex digits that change with anything a site reads of the task, its file's name included."""
    from fedmed.schema import to_dict

    # A declaration's file was read when the run was composed; a site never does.
    values = {key: value for key, value in to_dict(task).items() if key != "declaration"}
    return DIGEST + hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def not_private(instruction: "Instruction") -> str | None:
    """Why the run is NOT PRIVATE, or None."""
    if instruction.privacy.kind == "off":
        return "privacy=off"
    if instruction.privacy.seeded:
        return "privacy.seeded=true"
    return "task.declare=from_data" if instruction.task.declare == "from_data" else None


def run_epsilon(instruction: "Instruction", site: str, plan: "PrivacyPlan") -> float:
    """What the whole run costs at this site: its training, and its metrics where they are private.

    Raises:
        PrivacyError: it cannot be accounted, or the metrics are not worth their epsilon.
    """
    from fedmed.privacy.histogram import metrics_plans, site_epsilon

    return site_epsilon(plan, metrics_plans(instruction.task, instruction.privacy).get(site))


def epsilon(instruction: "Instruction", site: str, plan: "PrivacyPlan") -> tuple[float, str]:
    """`run_epsilon`, infinite where it cannot be said, and the same in words: never less than it is."""
    from fedmed.privacy.accounting import LARGEST_EPSILON
    from fedmed.privacy.in_words import round_up

    try:
        plan.epsilon()
    except PrivacyError:
        return math.inf, f"above {LARGEST_EPSILON:g}"
    try:
        cost = run_epsilon(instruction, site, plan)
    except PrivacyError:
        return math.inf, "private metrics that are not worth their epsilon"
    return cost, str(round_up(cost, digits=4))


def shown(text: str, *, longest: int = 100) -> str:
    """The coordinator's own text on one line, quoted, without what a terminal would obey, cut to a length."""
    line = "".join(character if character.isprintable() else " " for character in text)
    return f"'{line}'" if len(line) <= longest else f"'{line[:longest]}…'"
