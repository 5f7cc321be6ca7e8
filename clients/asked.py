"""What an instruction asks for, in the words in which a site's policy answers. Declared values only."""

import hashlib
import json
import math
from pathlib import PurePath
from typing import TYPE_CHECKING

from fedmed.config import TabularModelConfig, TextModelConfig
from fedmed.errors import PrivacyError

if TYPE_CHECKING:
    from fedmed.privacy.histogram import HistogramPlan
    from fedmed.privacy.plan import PrivacyPlan
    from fedmed.records import Instruction
    from fedmed.task import TableTaskConfig

# What a task's digest begins with.
DIGEST = "sha256:"


def task_digest(task: "TableTaskConfig") -> str:
    """`sha256:` and 64 hex digits that change with anything a site reads of the task, its file's name included."""
    from fedmed.schema import to_dict

    # The declaration's file was read when the run was composed; a site never does.
    values = {key: value for key, value in to_dict(task).items() if key != "declaration"}
    return DIGEST + hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def not_private(instruction: "Instruction") -> str | None:
    """Why the run is NOT PRIVATE, or None."""
    if instruction.privacy.kind == "off":
        return "privacy=off"
    if instruction.privacy.seeded:
        return "privacy.seeded=true"
    return "task.declare=from_data" if instruction.task.declare == "from_data" else None


def model_name(model: TextModelConfig | TabularModelConfig) -> str:
    """A pretrained model's PACKAGE:FOLDER or the name of its folder; of a table's model its kind."""
    if isinstance(model, TabularModelConfig):
        return "mlp" if model.hidden else "logistic"
    return model.package or PurePath(model.path or "").name


def epsilon(plan: "PrivacyPlan", histogram: "HistogramPlan | None" = None) -> tuple[float, str]:
    """What the whole run costs, private metrics included, and the same in words: never less than it is."""
    from fedmed.privacy.accounting import LARGEST_EPSILON, round_up
    from fedmed.privacy.histogram import site_epsilon

    try:
        cost = site_epsilon(plan, histogram)
    except PrivacyError:
        return math.inf, f"above {LARGEST_EPSILON:g}"
    return cost, str(round_up(cost, digits=4))


def shown(text: str, *, longest: int = 100) -> str:
    """The coordinator's own text on one line, quoted, without what a terminal would obey, cut to a length."""
    line = "".join(character if character.isprintable() else " " for character in text)
    return f"'{line}'" if len(line) <= longest else f"'{line[:longest]}…'"
