"""The settings of the benchmark, its rows, and the table that README.md shows: no run happens here."""

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from experiments.shared.rows import Row

FOLDER = Path(__file__).resolve().parent
# The first three whose skewed draw leaves each hospital 100 patients; a seed fixes the split and the initial network.
SEEDS = (1, 2, 4)
EPSILONS = ("1", "3", "8", "off")
LABEL_SKEW = 0.5
# Test AUC that the mean over seeds of the even split must reach at epsilon 8.
TARGET = 0.93
# Mean test AUC of a centralised ResNet-18 at 28 pixels without privacy (MedMNIST v2, table 3).
PUBLISHED = 0.944
COLUMNS = (
    "split", "strategy", "epsilon_target", "epsilon_spent", "seed", "auc", "accuracy", "seconds", "cpu_seconds",
    "commit",
)  # fmt: skip

# What a strategy adds to configs/experiment/xray.yaml, chosen on the validation images under shifts.
STRATEGIES = {
    "fedavg": "strategy=fedavg",
    "fedprox": "strategy=fedprox strategy.proximal_mu=0.01",
    "fedavgm": "strategy=fedavgm strategy.momentum=0.5 training.learning_rate=12",
    "fedadam": "strategy=fedadam strategy.learning_rate=0.1 training.learning_rate=8",
}
NAMES = {"fedavg": "FedAvg", "fedprox": "FedProx", "fedavgm": "FedAvgM", "fedadam": "FedAdam"}
# Without clipping a step is as long as the gradient: it needs a rate of its own.
OFF = "privacy=off privacy.metrics=none training.learning_rate=2 training.momentum=0.9 training.steps_per_round=9"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One cell of the table: `split` is `even` or `skew`, `epsilon` as in EPSILONS."""

    split: str
    strategy: str
    epsilon: str

    @property
    def name(self) -> str:
        """As `--only` takes it, e.g. skew-fedavg-8."""
        return f"{self.split}-{self.strategy}-{self.epsilon}"

    @property
    def overrides(self) -> str:
        """What follows `fedmed run`, beside the data and the seed."""
        privacy = OFF if self.epsilon == "off" else f"privacy.epsilon={self.epsilon}"
        return f"experiment=xray {STRATEGIES[self.strategy]} {privacy}"

    def rows(self, rows: Iterable[Row]) -> list[Row]:
        """Those of this setting."""
        mine = (self.split, self.strategy, self.epsilon)
        return [row for row in rows if (row["split"], row["strategy"], row["epsilon_target"]) == mine]


# In the order in which they are run: the target's first.
SETTINGS = (
    Setting(split="even", strategy="fedavg", epsilon="8"),
    Setting(split="even", strategy="fedavg", epsilon="off"),
    *(
        Setting(split="skew", strategy=strategy, epsilon=epsilon)
        for strategy in STRATEGIES
        for epsilon in ("8", "off", "3", "1")
    ),
)


def order(row: Row) -> tuple[int, int]:
    """By which results.csv is sorted."""
    names = [setting.name for setting in SETTINGS]
    return names.index("{split}-{strategy}-{epsilon_target}".format_map(row)), int(row["seed"])


def spread(rows: list[Row]) -> tuple[float, float]:
    """Mean and standard deviation of the AUC over seeds; the latter is 0 for one seed."""
    values = [float(row["auc"]) for row in rows]
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def table(rows: list[Row]) -> str:
    """README's table, in Markdown: a cell is mean ± deviation, and how many seeds where some are missing."""
    lines = ["| split | strategy | ε = 1 | ε = 3 | ε = 8 | off, NOT PRIVATE |", "|---|---|---|---|---|---|"]
    for split, strategy in dict.fromkeys((setting.split, setting.strategy) for setting in SETTINGS):
        cells = []
        for epsilon in EPSILONS:
            mine = Setting(split=split, strategy=strategy, epsilon=epsilon).rows(rows)
            cells.append(_cell(mine) if mine else "–")
        label = "even" if split == "even" else f"Dirichlet {LABEL_SKEW:g}"
        lines.append(f"| {' | '.join([label, NAMES[strategy], *cells])} |")
    return "\n".join(lines)


def _cell(rows: list[Row]) -> str:
    mean, deviation = spread(rows)
    if len(rows) == 1:
        return f"{mean:.3f} (1 seed)"
    seeds = "" if len(rows) == len(SEEDS) else f" ({len(rows)} seeds)"
    return f"{mean:.3f} ± {deviation:.3f}{seeds}"
