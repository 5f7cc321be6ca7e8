"""Which network is trained: a pretrained encoder, or a small one that starts from nothing.

Beside its settings each class says what the rest of fedmed asks of it: which kind of task it `reads`, whether it is
`pretrained` (and so has blocks for LoRA and a digest to pin), whether all that it trains is `linear`, and its names.
"""

from dataclasses import dataclass
from typing import ClassVar

from fedmed.errors import require
from fedmed.pretrained import PretrainedConfig


@dataclass(frozen=True, kw_only=True)
class TextModelConfig(PretrainedConfig):
    """A Hugging Face text encoder, with a linear head on its pooled output."""

    reads: ClassVar[str] = "table"
    beside: ClassVar[str] = "tokenizer"

    kind: str = "text"
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
        super().__post_init__()
        require(self.kind == "text", "model.kind", self.kind, "text")
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


@dataclass(frozen=True, kw_only=True)
class ImageModelConfig(PretrainedConfig):
    """A Hugging Face image encoder, with a linear head on its pooled output."""

    reads: ClassVar[str] = "image"
    beside: ClassVar[str] = "preprocessor_config.json"

    kind: str = "image"
    # Pixels a side of what the encoder reads. 0: as preprocessor_config.json says.
    image_size: int = 0
    # cls: the class token. mean: over the patches. pooler: what the encoder's authors publish as its embedding, where
    # its architecture has that (SigLIP, DINO, ConvNeXt; CLIP: before it is projected to where text is).
    pooling: str = "cls"
    # The L2 norm to which each record's pooled features are scaled.
    feature_norm: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.kind == "image", "model.kind", self.kind, "image")
        size = self.image_size
        require(size == 0 or 16 <= size <= 2048, "model.image_size", size, "16 to 2048, or 0")
        kinds = ("cls", "mean", "pooler")
        require(self.pooling in kinds, "model.pooling", self.pooling, "cls, mean or pooler")
        require(self.feature_norm > 0, "model.feature_norm", self.feature_norm, "> 0")


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


@dataclass(frozen=True, kw_only=True)
class SoundModelConfig(PretrainedConfig):
    """A pretrained encoder of sounds (HeAR), for embedding alone."""

    reads: ClassVar[str] = "sound"

    kind: str = "sound"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.kind == "sound", "model.kind", self.kind, "sound")


ModelConfig = TextModelConfig | ImageModelConfig | TabularModelConfig | CnnModelConfig | SoundModelConfig
