"""Every setting of a run, as frozen dataclasses that check themselves.

Each class is one option of a Hydra group (`model=minilm` fills a `TextModelConfig`); `kind` names the
class, so that a mapping read from a message or a run folder becomes the same dataclass again (`parse`).
No torch import here: a wrong setting is reported before anything heavy is loaded.
"""

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from fedmed.errors import ConfigError, nearest, require
from fedmed.model import (
    CnnModelConfig,
    ImageModelConfig,
    SoundModelConfig,
    TabularModelConfig,
    TextModelConfig,
)
from fedmed.schema import check_finite, from_dict
from fedmed.task import ImageTaskConfig, SoundTaskConfig, TableTaskConfig

# Names of `fedmed.devices.device_of`.
DEVICE = r"^(auto|cpu|cuda(:[0-9]{1,2})?)$"


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """What is trained and travels. `head`: the last linear layer. `full`: everything."""

    kind: str = "head"
    rank: int = 8
    alpha: float = 16.0
    # LoRA sits in the last `last_blocks` transformer blocks, on linear layers with these names.
    last_blocks: int = 3
    targets: list[str] = field(default_factory=list)
    # `full` only: also the embedding tables (large, and slow per sample).
    embeddings: bool = False

    def __post_init__(self) -> None:
        check_finite(self, "adapter")
        kinds = ("head", "lora", "ffa_lora", "full")
        require(self.kind in kinds, "adapter.kind", self.kind, " | ".join(kinds))
        require(1 <= self.rank <= 1024, "adapter.rank", self.rank, "1 to 1024")
        require(self.alpha > 0, "adapter.alpha", self.alpha, "> 0")
        require(self.last_blocks >= 1, "adapter.last_blocks", self.last_blocks, ">= 1")


@dataclass(frozen=True, kw_only=True)
class PrivacyConfig:
    """Differential privacy of the training (a target epsilon, or a noise multiplier) and of the metrics.

    Kind `off`: no clipping and no noise, NOT PRIVATE; only `records_per_patient` and `metrics` then matter.
    """

    kind: str = "dp"
    epsilon: float | None = 3.0
    noise_multiplier: float | None = None
    # None: 1e-4 for a public benchmark, else min(1e-5, 1 / (10 x declared size)).
    delta: float | None = None
    max_grad_norm: float = 0.5
    records_per_patient: int = 1
    min_declared_size: int = 20
    # Reproducible sampling and noise: NOT PRIVATE, and said wherever an epsilon would stand.
    seeded: bool = False
    # exact: after each round, outside the guarantee. private: one noisy histogram of the released adapter's scores at
    # each site, charged on top of the training. none: nothing is evaluated.
    metrics: str = "exact"
    # With `private`: epsilon of the histogram at the plan's delta, and the number of its bins.
    metrics_epsilon: float = 1.0
    metrics_bins: int = 10
    # The assumed fraction of positive patients, for the bins and the expected error: declared, never counted.
    metrics_prevalence: float = 0.5

    def __post_init__(self) -> None:
        check_finite(self, "privacy")
        require(self.kind in ("dp", "off"), "privacy.kind", self.kind, "dp or off")
        require(
            (self.epsilon is None) != (self.noise_multiplier is None),
            "privacy.epsilon/noise_multiplier",
            (self.epsilon, self.noise_multiplier),
            "exactly one of the two (for a given noise: privacy.epsilon=null privacy.noise_multiplier=2)",
        )
        # Outside these bounds the accountant takes minutes, or has no answer.
        bounds = {"epsilon": (1e-3, 100), "noise_multiplier": (0.1, 10_000), "delta": (1e-12, 0.1)}
        for name, (low, high) in bounds.items():
            value = getattr(self, name)
            ok = value is None or low <= value <= high
            require(ok, f"privacy.{name}", value, f"> 0, from {low:g} to {high:g}")
        require(self.max_grad_norm > 0, "privacy.max_grad_norm", self.max_grad_norm, "> 0")
        require(
            self.records_per_patient >= 1, "privacy.records_per_patient", self.records_per_patient, ">= 1"
        )
        require(self.min_declared_size >= 1, "privacy.min_declared_size", self.min_declared_size, ">= 1")
        self._check_metrics()

    def _check_metrics(self) -> None:
        kinds = ("exact", "private", "none")
        require(self.metrics in kinds, "privacy.metrics", self.metrics, " | ".join(kinds))
        require(
            self.metrics != "private" or (self.kind == "dp" and not self.seeded),
            "privacy.metrics",
            self.metrics,
            "exact or none with privacy=off or privacy.seeded=true: such a run is NOT PRIVATE",
        )
        epsilon, bins, prevalence = self.metrics_epsilon, self.metrics_bins, self.metrics_prevalence
        require(0.01 <= epsilon <= 100, "privacy.metrics_epsilon", epsilon, "0.01 to 100")
        require(2 <= bins <= 20, "privacy.metrics_bins", bins, "2 to 20")
        require(0.01 <= prevalence <= 0.99, "privacy.metrics_prevalence", prevalence, "0.01 to 0.99")


@dataclass(frozen=True, kw_only=True)
class StrategyConfig:
    """How the coordinator turns the sites' updates into the next global adapter."""

    kind: str = "fedavg"
    learning_rate: float = 1.0
    momentum: float = 0.9
    beta_1: float = 0.9
    beta_2: float = 0.99
    tau: float = 1e-3
    # FedProx: weight of the proximal term, added at the site after clipping and noise.
    proximal_mu: float = 0.0
    # The released adapter is the mean of the global adapters of the last rounds (post-processing).
    average_last: int = 1
    # A site's update with a larger L2 norm is dropped; 0: no bound.
    norm_bound: float = 0.0

    def __post_init__(self) -> None:
        check_finite(self, "strategy")
        kinds = ("fedavg", "fedprox", "fedavgm", "fedadam", "fedyogi", "fedadagrad")
        require(self.kind in kinds, "strategy.kind", self.kind, " | ".join(kinds))
        require(self.learning_rate > 0, "strategy.learning_rate", self.learning_rate, "> 0")
        for name in ("momentum", "beta_1", "beta_2"):
            require(0 <= getattr(self, name) < 1, f"strategy.{name}", getattr(self, name), "0 <= value < 1")
        require(self.tau > 0, "strategy.tau", self.tau, "> 0")
        require(self.proximal_mu >= 0, "strategy.proximal_mu", self.proximal_mu, ">= 0")
        require(self.average_last >= 1, "strategy.average_last", self.average_last, ">= 1")
        require(self.norm_bound >= 0, "strategy.norm_bound", self.norm_bound, ">= 0")


@dataclass(frozen=True, kw_only=True)
class FederationConfig:
    """Where the sites run, and how long the coordinator waits for them."""

    kind: str = "local"
    # The coordinator's folder, of a consortium.
    coordinator: str | None = None
    # Processes that play the sites: 0 picks one per core, up to the number of sites.
    workers: int = 1
    # Where their networks compute: auto (the first GPU that PyTorch finds, else the processor), cpu, cuda or cuda:N.
    # Of sites that have a folder, site.yaml says it.
    device: str = "auto"
    # The fraction of sites whose good replies a round needs.
    quorum: float = 0.5
    timeout: float = 600.0
    # A folder that holds one site's folder for each site, by its name: the sites' own policies and ledgers then
    # decide. null: one person plays all sites, and nothing is remembered.
    sites: str | None = None
    # How long to wait for people at the sites to approve the run, in seconds.
    approval_timeout: float = 3600.0

    def __post_init__(self) -> None:
        check_finite(self, "federation")
        require(self.kind in ("local", "consortium"), "federation.kind", self.kind, "local or consortium")
        require(self.coordinator != "", "federation.coordinator", "''", "a coordinator's folder")
        require(
            self.kind == "local" or self.sites is None,
            "federation.sites",
            self.sites,
            "null with federation=consortium: its sites are elsewhere",
        )
        require(self.workers >= 0, "federation.workers", self.workers, ">= 0")
        require(
            re.fullmatch(DEVICE, self.device) is not None, "federation.device", self.device,
            "auto, cpu, cuda or cuda:N",
        )  # fmt: skip
        require(
            self.device == "auto" or not self.ledgers,
            "federation.device",
            self.device,
            "auto; sites with a folder of their own set device in their site.yaml",
        )
        require(0 < self.quorum <= 1, "federation.quorum", self.quorum, "0 < quorum <= 1")
        require(self.timeout > 0, "federation.timeout", self.timeout, "> 0 seconds")
        require(
            self.approval_timeout >= 0, "federation.approval_timeout", self.approval_timeout, ">= 0 seconds"
        )
        require(self.sites != "", "federation.sites", "''", "a folder, or null")

    @property
    def ledgers(self) -> bool:
        """Whether the sites remember what they answered: asked the same again, they repeat it and charge nothing."""
        return self.kind == "consortium" or self.sites is not None


def _check_uri(uri: str) -> None:
    """Refuse what MLflow could not use, and a password: this setting is written into the run's folder."""
    try:
        parts = urlsplit(uri)
        held = parts.password is not None or (
            parts.username is not None and parts.scheme in ("http", "https")
        )
        whole = parts.port is None or bool(parts.hostname)
    except ValueError:
        held, whole = "@" in uri, False
    if held:
        raise ConfigError(
            "tracking.uri: holds a password, which would be written down with the run; for a server set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, for a database use PGPASSWORD or ~/.pgpass"
        )
    # A database's driver may stand behind its name: postgresql+psycopg2.
    scheme, colon, _ = uri.partition(":")
    known = scheme.partition("+")[0] in ("sqlite", "postgresql", "mysql", "mssql", "http", "https", "file")
    require(
        known and whole and bool(colon),
        "tracking.uri",
        uri or "''",
        "e.g. sqlite:///mlruns.db or http://127.0.0.1:5000",
    )


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Where metrics and artifacts go besides the run folder."""

    kind: str = "mlflow"
    uri: str = "sqlite:///mlruns.db"
    experiment: str = "fedmed"

    def __post_init__(self) -> None:
        require(self.kind in ("mlflow", "none"), "tracking.kind", self.kind, "mlflow or none")
        _check_uri(self.uri)
        require(bool(self.experiment), "tracking.experiment", "''", "a name")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """A site's local work in one round."""

    steps_per_round: int = 1
    # Probability with which each patient enters a step (Poisson sampling).
    sample_rate: float = 1.0
    optimizer: str = "sgd"
    # null: the default of the adapter.
    learning_rate: float | None = None
    momentum: float = 0.0
    weight_decay: float = 0.0
    # Records in memory at once; larger batches are split without changing the result. null: at most 256, whose
    # activations were seen to take at most 1 GB together; on a GPU 2048, and a quarter of its free memory.
    physical_batch_size: int | None = None
    # What layers compute in while training: fp32, or bf16 where PyTorch's autocast would (faster for transformers:
    # experiments/speed). Weights, gradients of patients, clipping, noise, the head and scores are fp32 or better.
    precision: str = "fp32"

    def __post_init__(self) -> None:
        check_finite(self, "training")
        require(self.steps_per_round >= 1, "training.steps_per_round", self.steps_per_round, ">= 1")
        require(0 < self.sample_rate <= 1, "training.sample_rate", self.sample_rate, "0 < rate <= 1")
        require(self.optimizer in ("sgd", "adam"), "training.optimizer", self.optimizer, "sgd or adam")
        require(
            self.learning_rate is None or self.learning_rate > 0,
            "training.learning_rate",
            self.learning_rate,
            "> 0",
        )
        require(0 <= self.momentum < 1, "training.momentum", self.momentum, "0 <= momentum < 1")
        require(self.weight_decay >= 0, "training.weight_decay", self.weight_decay, ">= 0")
        size = self.physical_batch_size
        require(size is None or size >= 1, "training.physical_batch_size", size, ">= 1")
        require(self.precision in ("fp32", "bf16"), "training.precision", self.precision, "fp32 or bf16")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run, whole. The groups are typed `Any` for Hydra; `__post_init__` holds them to `OPTIONS`."""

    task: Any
    model: Any
    adapter: Any
    privacy: Any
    strategy: Any
    federation: Any
    tracking: Any
    training: TrainingConfig = field(default_factory=TrainingConfig)
    name: str = "run"
    rounds: int = 20
    seed: int = 0
    # Also train each site alone and without privacy, to compare with.
    reference: bool = False
    # The folder of this run; null: runs/<time>-<name>.
    run_dir: str | None = None
    # A run folder to continue; its own configuration is used, only `rounds` may change.
    resume: str | None = None

    def __post_init__(self) -> None:
        steps = self.training.steps_per_round
        require(self.rounds >= 1, "rounds", self.rounds, ">= 1")
        require(
            self.rounds * steps <= MAX_STEPS,
            "rounds",
            self.rounds,
            f"at most {MAX_STEPS // steps} with training.steps_per_round={steps}: {MAX_STEPS:,} steps in all",
        )
        require(0 <= self.seed < 2**63, "seed", self.seed, "0 <= seed < 2^63")
        word = 0 < len(self.name) <= 100 and "/" not in self.name and self.name.isprintable()
        require(word, "name", self.name, "at most 100 characters without '/'")
        for key in ("run_dir", "resume"):
            require(getattr(self, key) != "", key, "''", "a folder, or null")
        for group, kinds in OPTIONS.items():
            value = getattr(self, group)
            require(type(value) in kinds.values(), group, value, f"one of the options of '{group}'")
        require(
            not self.reference or self.task.public_benchmark,
            "reference",
            "true",
            "false, unless task.public_benchmark=true: the references train on the same patients outside epsilon",
        )
        require(
            not (self.reference and (self.federation.sites or self.federation.kind == "consortium")),
            "reference",
            "true",
            "false with federation.sites or federation=consortium: the references would train on the same patients "
            "again",
        )
        require(
            not self.reference or self.privacy.metrics == "exact",
            "reference",
            "true",
            f"false with privacy.metrics={self.privacy.metrics}: references are evaluated exactly",
        )
        require(
            self.privacy.metrics != "private" or self.private,
            "privacy.metrics",
            self.privacy.metrics,
            f"exact or none: the run is NOT PRIVATE ({self.not_private_reason()})",
        )
        require(
            self.model.reads == self.task.kind,
            "model.kind",
            self.model.kind,
            f"a model that reads a task of kind '{self.task.kind}': {_readers(self.task.kind)}",
        )
        require(
            self.model.pretrained or self.adapter.kind in ("head", "full"),
            "adapter",
            self.adapter.kind,
            f"head or full: a {self.model.kind} model has no transformer blocks",
        )
        if self.training.learning_rate is None:
            rates = ADAM_RATES if self.training.optimizer == "adam" else SGD_RATES
            linear = self.adapter.kind == "head" or self.model.linear
            rate = rates["head" if linear else self.adapter.kind]
            object.__setattr__(self, "training", dataclasses.replace(self.training, learning_rate=rate))
        require(
            self.strategy.average_last <= self.rounds,
            "strategy.average_last",
            self.strategy.average_last,
            f"at most rounds={self.rounds}",
        )

    @property
    def private(self) -> bool:
        """Whether an epsilon may be printed for this run."""
        return self.privacy.kind == "dp" and not self.privacy.seeded and self.task.declare != "from_data"

    def not_private_reason(self) -> str | None:
        """Why this run is NOT PRIVATE, or None."""
        if self.privacy.kind == "off":
            return "privacy=off: no clipping, no noise"
        if self.privacy.seeded:
            return "privacy.seeded=true: whoever knows the seed can subtract the noise"
        if self.task.declare == "from_data":
            return "task.declare=from_data: ranges, categories and sizes were read from the records"
        return None


# More would take the accountant minutes, and are a slip of the finger.
MAX_STEPS = 1_000_000
# Default learning rates by adapter; a head on features of norm 1 takes long steps.
SGD_RATES = {"head": 2.0, "lora": 0.2, "ffa_lora": 0.2, "full": 0.05}
ADAM_RATES = {"head": 0.05, "lora": 1e-3, "ffa_lora": 1e-3, "full": 1e-4}

OPTIONS: dict[str, dict[str, type]] = {
    "task": {"table": TableTaskConfig, "image": ImageTaskConfig, "sound": SoundTaskConfig},
    "model": {
        "text": TextModelConfig,
        "image": ImageModelConfig,
        "tabular": TabularModelConfig,
        "cnn": CnnModelConfig,
        "sound": SoundModelConfig,
    },
    "adapter": {kind: AdapterConfig for kind in ("head", "lora", "ffa_lora", "full")},
    "privacy": {"dp": PrivacyConfig, "off": PrivacyConfig},
    "strategy": {
        kind: StrategyConfig for kind in ("fedavg", "fedprox", "fedavgm", "fedadam", "fedyogi", "fedadagrad")
    },
    "federation": {kind: FederationConfig for kind in ("local", "consortium")},
    "tracking": {kind: TrackingConfig for kind in ("mlflow", "none")},
}


def _readers(task_kind: str) -> str:
    """The kinds of models that read a kind of task, for a message."""
    return ", ".join(kind for kind, cls in OPTIONS["model"].items() if getattr(cls, "reads", "") == task_kind)


def parse(group: str, values: dict[str, Any]) -> Any:
    """The dataclass that a plain mapping (of a message, a run folder) describes. Unknown keys are refused.

    Raises:
        ConfigError: unknown kind or key, a missing key, or a value of another type.
    """
    require(isinstance(values, dict), group, values, "a mapping")
    kind = values.get("kind")
    if not isinstance(kind, str) or kind not in OPTIONS[group]:
        raise ConfigError(f"{group}.kind={kind}: {nearest(str(kind), OPTIONS[group])}")
    return from_dict(OPTIONS[group][kind], values, where=group)


def run_config_from_dict(values: dict[str, Any]) -> RunConfig:
    """The run configuration that `to_dict` wrote."""
    require(isinstance(values, dict), "configuration", values, "a mapping")
    rest = {key: value for key, value in values.items() if key not in OPTIONS}
    missing = [group for group in OPTIONS if group not in values]
    if missing:
        raise ConfigError(f"configuration without {', '.join(missing)}: the file is damaged")
    return from_dict(RunConfig, rest | {group: parse(group, values[group]) for group in OPTIONS})
