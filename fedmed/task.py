"""What is learned: labels, columns, the privacy unit, the public sizes of the sites."""

from dataclasses import dataclass, field
from string import Formatter
from typing import Any, ClassVar

from fedmed.errors import require
from fedmed.schema import check_finite, from_dict


@dataclass(frozen=True, kw_only=True)
class ColumnConfig:
    """What one column of a table may hold, declared by a person, never read from the data.

    Numeric: `low` and `high` bound it (values outside are clipped). Categorical: `categories` are the
    allowed cells, the first of them the reference. `missing` lists cells that mean "not measured".
    A record is written out as a sentence from each column's `phrase` (with `{value}`, or `{word}` for the
    cut-off's word), a category's entry in `words`, or, for a blank cell, `blank`.
    """

    kind: str = "numeric"
    low: float | None = None
    high: float | None = None
    categories: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    phrase: str = ""
    words: dict[str, str] = field(default_factory=dict)
    # Clinical cut-offs: the first word stands below the first cut-off, the last at or above the last.
    cutoffs: list[float] = field(default_factory=list)
    cutoff_words: list[str] = field(default_factory=list)
    decimals: int = 0
    blank: str = ""

    def __post_init__(self) -> None:
        check_finite(self, "task.columns.*")
        require(
            self.kind in ("numeric", "categorical"),
            "task.columns.*.kind",
            self.kind,
            "numeric or categorical",
        )
        require(0 <= self.decimals <= 10, "task.columns.*.decimals", self.decimals, "0 to 10")
        if self.kind == "numeric":
            require(
                self.low is not None and self.high is not None and self.low < self.high,
                "task.columns.*.low/high",
                (self.low, self.high),
                "low < high, both declared (propose them with: fedmed task describe FILE)",
            )
        else:
            require(
                len(self.categories) >= 1 and len(set(self.categories)) == len(self.categories),
                "task.columns.*.categories",
                self.categories,
                "at least one category, none twice",
            )
        require(
            _only_values(self.phrase),
            "task.columns.*.phrase",
            self.phrase,
            "only {value} and {word} in braces",
        )
        if self.cutoff_words:
            require(
                len(self.cutoff_words) == len(self.cutoffs) + 1
                and list(self.cutoffs) == sorted(self.cutoffs),
                "task.columns.*.cutoff_words",
                self.cutoff_words,
                "one word more than the ascending cutoffs",
            )


def _only_values(phrase: str) -> bool:
    """Whether a phrase is filled in with plain values: a width or an attribute could ask a site for gigabytes."""
    try:
        fields = list(Formatter().parse(phrase))
    except ValueError:
        return False
    return all(
        name in (None, "value", "word") and not spec and not conversion
        for _, name, spec, conversion in fields
    )


@dataclass(frozen=True, kw_only=True)
class TableTaskConfig:
    """A binary outcome in a table, one row a record, federated by a column."""

    # Whether runs train on such records.
    trained: ClassVar[bool] = True
    # Whether the data itself says which records are one patient's; of a table a column may.
    knows_patients: ClassVar[bool] = False
    # What can propose its declaration, where something can.
    propose: ClassVar[str] = ", or propose them with: fedmed task describe FILE"

    kind: str = "table"
    title: str = ""
    # A CSV file, or "pkg://package/file" for one that a Python package carries.
    path: str | None = None
    # A YAML file with any of these keys, as `fedmed task describe` writes it; read when composing.
    declaration: str | None = None
    site_column: str = "site"
    label: str = "label"
    positive: list[str] = field(default_factory=lambda: ["1"])
    negative: list[str] = field(default_factory=lambda: ["0"])
    # Without a patient column the privacy unit is the record, and every page says so.
    patient_column: str | None = None
    # Public number of patients (or records) of each site; its keys are the sites of the run.
    declared_sizes: dict[str, int] = field(default_factory=dict)
    # Name -> ColumnConfig. Typed Any for Hydra: OmegaConf makes values of a frozen class read-only.
    columns: dict[str, Any] = field(default_factory=dict)
    separator: str = ", "
    # What an empty cell does: "indicator" (the record is kept, the cell marked as blank) or "drop" (the
    # record is left out). A cell that a column lists as `missing` is always marked.
    blanks: str = "indicator"
    # "declared": only what is written here; "from_data": ranges, categories and sizes are read from the
    # table, which is a function of its records: public data only, and NOT PRIVATE.
    declare: str = "declared"
    test_fraction: float = 0.34
    # "hash": a keyed hash of the patient id, the key stays at the site; "shuffle": by `seed`, for
    # public benchmarks.
    split: str = "hash"
    # A published benchmark: its default delta is 1e-4.
    public_benchmark: bool = False

    def __post_init__(self) -> None:
        require(self.kind == "table", "task.kind", self.kind, "table")
        require(bool(self.path), "task.path", self.path, "a CSV file, e.g. task.path=patients.csv")
        object.__setattr__(
            self, "columns", {name: _column(name, column) for name, column in self.columns.items()}
        )
        require(self.blanks in ("indicator", "drop"), "task.blanks", self.blanks, "indicator or drop")
        require(
            self.declare in ("declared", "from_data"), "task.declare", self.declare, "declared or from_data"
        )
        _check_public(self)

    @property
    def sites_from(self) -> str:
        """Where the sites of the data are named, in words."""
        return f"column '{self.site_column}'"

    @property
    def unit(self) -> str:
        """The privacy unit: `patient` where a patient column is declared, else `record`."""
        return "patient" if self.patient_column else "record"

    def declared_train(self, site: str) -> int:
        """The declared size of a site's training part: a public constant, never a count."""
        return _training_part(self.declared_sizes[site], self.test_fraction)

    def declared_held_out(self, site: str) -> int:
        """The declared size of a site's test part."""
        return self.declared_sizes[site] - self.declared_train(site)


@dataclass(frozen=True, kw_only=True)
class ImageTaskConfig:
    """A binary outcome in images that were ingested from DICOM: a folder a site, several images a patient."""

    trained: ClassVar[bool] = True
    # DICOM has patient ids, and ingestion leaves out what has none.
    knows_patients: ClassVar[bool] = True
    patient_column: ClassVar[None] = None
    propose: ClassVar[str] = ""

    kind: str = "image"
    title: str = ""
    # A folder that holds one ingested folder for each site, by the site's name; or, of a single site, that folder.
    path: str | None = None
    # Classes of the labels' table.
    positive: list[str] = field(default_factory=lambda: ["1"])
    negative: list[str] = field(default_factory=lambda: ["0"])
    # Images of other modalities are left out.
    modalities: list[str] = field(default_factory=lambda: ["CR", "DX", "CT", "MR", "US", "MG"])
    # An image is resampled to at most this many pixels a side and padded with black to a square.
    image_size: int = 64
    # Evenly spaced frames of a clip, or slices of a volume, as channels; 1: the middle one.
    slices: int = 1
    # Public number of patients of each site; its keys are the sites of the run.
    declared_sizes: dict[str, int] = field(default_factory=dict)
    # Public maximum of images a patient: further ones are left out. null: no maximum.
    images_per_patient: int | None = None
    # Public number of images of each site. Empty: images_per_patient for every patient. Read with `unit: image`.
    declared_images: dict[str, int] = field(default_factory=dict)
    # Whose gradient is clipped and whom epsilon protects. "image" protects a patient with several images less than
    # it says: on public benchmarks alone, to compare with.
    unit: str = "patient"
    declare: str = "declared"
    test_fraction: float = 0.34
    # "hash": a keyed hash of the patient's pseudonym, the key stays at the site; "shuffle": by `seed`, for public
    # benchmarks. Either way all images of a patient fall on one side.
    split: str = "hash"
    # A published or synthetic benchmark: its default delta is 1e-4.
    public_benchmark: bool = False

    def __post_init__(self) -> None:
        require(self.kind == "image", "task.kind", self.kind, "image")
        require(
            bool(self.path), "task.path", self.path, "the folder of ingested data, e.g. task.path=ingested"
        )
        require(
            bool(self.modalities) and all(self.modalities),
            "task.modalities",
            self.modalities,
            "e.g. [CR, DX]",
        )
        require(16 <= self.image_size <= 1024, "task.image_size", self.image_size, "16 to 1024")
        require(1 <= self.slices <= 64, "task.slices", self.slices, "1 to 64")
        most = self.images_per_patient
        require(most is None or 1 <= most <= 10_000, "task.images_per_patient", most, "1 to 10,000, or null")
        require(self.unit in ("patient", "image"), "task.unit", self.unit, "patient or image")
        require(
            self.unit == "patient" or self.public_benchmark,
            "task.unit",
            self.unit,
            "patient, unless task.public_benchmark=true: an epsilon for one image is none for a patient with several",
        )
        require(self.declare == "declared", "task.declare", self.declare, "declared")
        _check_folders(self)
        for site, images in self.declared_images.items():
            require(1 <= images <= 10**9, f"task.declared_images.{site}", images, "1 to 1,000,000,000")
        _check_public(self)

    @property
    def sites_from(self) -> str:
        """Where the sites of the data are named, in words."""
        return f"folder '{self.path}'"

    def declared_train(self, site: str) -> int:
        """The declared size of a site's training part, in units: a public constant, never a count."""
        return _training_part(self._declared(site), self.test_fraction)

    def declared_held_out(self, site: str) -> int:
        """The declared size of a site's test part, in units."""
        return self._declared(site) - self.declared_train(site)

    def _declared(self, site: str) -> int:
        patients = self.declared_sizes[site]
        if self.unit == "patient":
            return patients
        return self.declared_images.get(site, patients * (self.images_per_patient or 1))


@dataclass(frozen=True, kw_only=True)
class SoundTaskConfig:
    """A binary outcome in recordings: WAV files that an index.csv names, a folder a site. To be embedded alone."""

    trained: ClassVar[bool] = False
    knows_patients: ClassVar[bool] = True
    patient_column: ClassVar[str] = "patient"
    unit: ClassVar[str] = "patient"
    declare: ClassVar[str] = "declared"
    propose: ClassVar[str] = ""

    kind: str = "sound"
    title: str = ""
    # A folder that holds one folder for each site, by the site's name; or, of a single site, that folder.
    path: str | None = None
    # Values of the index's label.
    positive: list[str] = field(default_factory=lambda: ["1"])
    negative: list[str] = field(default_factory=lambda: ["0"])
    # Clips of two seconds, in the middle of as many equal parts of a recording.
    clips: int = 1
    # Public number of patients of each site.
    declared_sizes: dict[str, int] = field(default_factory=dict)
    test_fraction: float = 0.34
    # As in `ImageTaskConfig`.
    split: str = "hash"
    public_benchmark: bool = False

    def __post_init__(self) -> None:
        require(self.kind == "sound", "task.kind", self.kind, "sound")
        require(
            bool(self.path), "task.path", self.path, "the folder of recordings, e.g. task.path=recordings"
        )
        require(1 <= self.clips <= 64, "task.clips", self.clips, "1 to 64")
        _check_folders(self)
        _check_public(self)

    @property
    def sites_from(self) -> str:
        """Where the sites of the data are named, in words."""
        return f"folder '{self.path}'"

    def declared_train(self, site: str) -> int:
        """The declared size of a site's training part, in patients: a public constant, never a count."""
        return _training_part(self.declared_sizes[site], self.test_fraction)

    def declared_held_out(self, site: str) -> int:
        """The declared size of a site's test part, in patients."""
        return self.declared_sizes[site] - self.declared_train(site)


TaskConfig = TableTaskConfig | ImageTaskConfig | SoundTaskConfig


def _check_folders(task: TaskConfig) -> None:
    """A site's name is the name of its folder."""
    for site in task.declared_sizes:
        plain = site not in ("", ".", "..") and "/" not in site and "\0" not in site
        require(plain, "task.declared_sizes", site, "names of folders, without '/'")


def _check_public(task: TaskConfig) -> None:
    """What holds for a task of every kind: classes, split and public sizes."""
    require(task.split in ("hash", "shuffle"), "task.split", task.split, "hash or shuffle")
    require(
        task.split == "hash" or task.public_benchmark,
        "task.split",
        task.split,
        "hash, unless task.public_benchmark=true: a seeded shuffle depends on who else is in the data",
    )
    require(0 < task.test_fraction < 1, "task.test_fraction", task.test_fraction, "between 0 and 1")
    for site, size in task.declared_sizes.items():
        require(1 <= size <= 10**9, f"task.declared_sizes.{site}", size, "1 to 1,000,000,000")
    require(
        bool(task.positive) and bool(task.negative) and not set(task.positive) & set(task.negative),
        "task.positive/negative",
        (task.positive, task.negative),
        "two lists with no value in common",
    )


def _training_part(size: int, test_fraction: float) -> int:
    return max(1, round((1 - test_fraction) * size))


def _column(name: str, column: Any) -> ColumnConfig:
    where = f"task.columns.{name}"
    if isinstance(column, ColumnConfig):
        return column
    require(isinstance(column, dict), where, column, f"the keys of a column, e.g. {where}.low=0")
    built: ColumnConfig = from_dict(ColumnConfig, column, where=where)
    return built
