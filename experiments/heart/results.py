"""The settings of the benchmark, its rows, and the table that README.md shows: no run happens here."""

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from experiments.shared.rows import Row

FOLDER = Path(__file__).resolve().parent
SEEDS = range(5)
DRAWS = 3
COLUMNS = (
    "setting", "epsilon_target", "epsilon_spent", "seed", "draw", "pooled_auc", "pooled_accuracy",
    "mean_hospital_accuracy", "seconds", "commit",
)  # fmt: skip
AUC, ACCURACY = "pooled_auc", "mean_hospital_accuracy"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One line of the table.

    Attributes:
        overrides: what follows `fedmed run`.
        draws: repetitions of each seed with fresh noise; 1 without privacy, where a seed fixes everything.
        metric: the column that `target` is about.
        target: what the mean over seeds must reach; None: reported only.
    """

    name: str
    label: str
    overrides: str
    draws: int = 1
    metric: str = AUC
    target: float | None = None


SETTINGS = (
    Setting(
        name="head-eps1", label="head, epsilon 1", overrides="experiment=demo privacy.epsilon=1",
        draws=DRAWS, target=0.84,
    ),
    Setting(
        name="head-eps3", label="head, epsilon 3", overrides="experiment=demo", draws=DRAWS, target=0.865
    ),
    Setting(
        name="head-off", label="head, NOT PRIVATE", overrides="experiment=demo privacy=off", target=0.875
    ),
    Setting(
        name="lora-off", label="LoRA in the last 3 of 6 blocks, NOT PRIVATE", overrides="experiment=heart_lora",
        target=0.90,
    ),
    Setting(
        name="logistic10-eps1", label="logistic, 10 features, epsilon 1", overrides="experiment=heart10",
        draws=DRAWS, metric=ACCURACY, target=0.78,
    ),
    Setting(
        name="logistic10-off", label="logistic, 10 features, NOT PRIVATE",
        overrides="experiment=heart10 privacy=off", metric=ACCURACY, target=0.80,
    ),
)  # fmt: skip


def order(row: Row) -> tuple[int, int, int]:
    """By which results.csv is sorted."""
    names = [setting.name for setting in SETTINGS]
    return names.index(row["setting"]), int(row["seed"]), int(row["draw"])


def missing(
    setting: Setting, rows: list[Row], seeds: Iterable[int], draws: Iterable[int]
) -> list[tuple[int, list[int]]]:
    """Each draw of a setting with the seeds that it still lacks."""
    have = {(int(row["draw"]), int(row["seed"])) for row in rows if row["setting"] == setting.name}
    left = [(draw, [seed for seed in seeds if (draw, seed) not in have]) for draw in draws]
    return [(draw, seeds_left) for draw, seeds_left in left if seeds_left]


def spread(rows: list[Row], column: str) -> tuple[float, float, float | None]:
    """Mean over seeds, standard deviation between seeds (of their means over draws), and between draws.

    The last is the root of the draws' mean variance within a seed; None where a seed has one draw.
    """
    by_seed: dict[str, list[float]] = {}
    for row in rows:
        by_seed.setdefault(row["seed"], []).append(float(row[column]))
    means = [statistics.fmean(values) for values in by_seed.values()]
    between = statistics.stdev(means) if len(means) > 1 else 0.0
    within = None
    if all(len(values) > 1 for values in by_seed.values()):
        within = statistics.fmean(statistics.variance(values) for values in by_seed.values()) ** 0.5
    return statistics.fmean(means), between, within


def table(rows: list[Row]) -> str:
    """README's table, in Markdown."""
    lines = [
        "| setting | epsilon spent | pooled AUC | sd seeds | sd draws "
        "| mean-hospital accuracy | sd seeds | sd draws | target | met |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for setting in SETTINGS:
        mine = [row for row in rows if row["setting"] == setting.name]
        if not mine:
            continue
        means = {column: spread(mine, column) for column in (AUC, ACCURACY)}
        target, met = "–", "–"
        if setting.target is not None:
            target = f"{'AUC' if setting.metric == AUC else 'accuracy'} ≥ {setting.target:g}"
            met = "yes" if means[setting.metric][0] >= setting.target else "no"
        figures = [
            "–" if value is None else f"{value:.3f}" for column in (AUC, ACCURACY) for value in means[column]
        ]
        spent = max(row["epsilon_spent"] for row in mine)
        lines.append(f"| {' | '.join([setting.label, spent, *figures, target, met])} |")
    return "\n".join(lines)
