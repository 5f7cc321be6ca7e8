"""The points of the curve, its rows, and their bands: no run happens here."""

import statistics
from dataclasses import dataclass
from pathlib import Path

from experiments.shared.rows import Row

FOLDER = Path(__file__).resolve().parent
COLUMNS = ("data", "method", "epsilon", "patients", "seed", "auc", "epsilon_spent", "cpu_seconds", "commit")
# Labelled patients of the whole federation, half at each of two hospitals.
SIZES = (10, 20, 40, 80, 160, 320)
SEEDS = range(5)
EPSILONS = ("off", "8")
DATA = ("phantoms", "pneumoniamnist")


@dataclass(frozen=True, kw_only=True)
class Method:
    """What is trained; `overrides` follow `fedmed run experiment=data_efficiency`."""

    name: str
    label: str
    overrides: tuple[str, ...] = ()


_ADAM = ("training.optimizer=adam", "training.learning_rate=0.003")
METHODS = (
    Method(name="head", label="linear probe"),
    Method(
        name="lora", label="LoRA, last 2 blocks", overrides=("adapter=lora", "adapter.last_blocks=2", *_ADAM)
    ),
    Method(
        name="scratch",
        label="from scratch",
        # Three times the steps of the others: it has more to learn.
        overrides=(
            "model=cnn", "adapter=full", "task.image_size=32", "training.steps_per_round=18", *_ADAM,
        ),
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Point:
    """One run of the curve."""

    data: str
    method: str
    epsilon: str
    patients: int
    seed: int

    @property
    def key(self) -> tuple[str, ...]:
        """What tells its row from others."""
        return self.data, self.method, self.epsilon, str(self.patients), str(self.seed)


def points(data: str, sizes: tuple[int, ...] = SIZES, seeds: range = SEEDS) -> list[Point]:
    """All runs, one whole seed after the other: a curve is there before its band."""
    return [
        Point(data, method.name, epsilon, patients, seed)
        for seed in seeds
        for patients in sizes
        for method in METHODS
        for epsilon in EPSILONS
    ]


def key(row: Row) -> tuple[str, ...]:
    """As `Point.key`."""
    return tuple(row[name] for name in COLUMNS[:5])


def order(row: Row) -> tuple[str, int, str, int, int]:
    """By which results.csv is sorted: it does not depend on when each was run."""
    names = [method.name for method in METHODS]
    return row["data"], names.index(row["method"]), row["epsilon"], int(row["patients"]), int(row["seed"])


def band(values: list[float]) -> tuple[float, float, float]:
    """Mean, and the 95% interval of the mean over seeds by Student's t, within 0 and 1; of one value no width."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, mean, mean
    from scipy.stats import t

    half = float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    return mean, max(0.0, mean - half), min(1.0, mean + half)


def curve(rows: list[Row], *, data: str, method: str, epsilon: str) -> dict[int, list[float]]:
    """The AUCs of each number of patients, in ascending order."""
    found: dict[int, list[float]] = {}
    for row in sorted(rows, key=lambda r: int(r["patients"])):
        if (row["data"], row["method"], row["epsilon"]) == (data, method, epsilon):
            found.setdefault(int(row["patients"]), []).append(float(row["auc"]))
    return found


def table(rows: list[Row]) -> str:
    """README's tables, in Markdown: mean AUC and its 95% interval."""
    texts = []
    for data in DATA:
        sizes = sorted({int(row["patients"]) for row in rows if row["data"] == data})
        if not sizes:
            continue
        lines = [f"| {data} | epsilon | {' | '.join(map(str, sizes))} |", "|---" * (len(sizes) + 2) + "|"]
        for method in METHODS:
            for epsilon in EPSILONS:
                found = curve(rows, data=data, method=method.name, epsilon=epsilon)
                cells = [
                    "{:.3f} ({:.3f} to {:.3f})".format(*band(found[n])) if n in found else "–" for n in sizes
                ]
                lines.append(f"| {method.label} | {epsilon} | {' | '.join(cells)} |")
        texts.append("\n".join(lines))
    return "\n\n".join(texts)
