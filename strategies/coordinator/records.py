"""What a coordinator knows of a run: `run.json` in the run's folder, and what the run itself wrote beside it.

The process that runs the coordinator alone changes `run.json`. A person's wish to stop a run is a file of its own, so
that it is heard whoever is up.
"""

import dataclasses
import json
import re
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedmed.atomic import write_json
from fedmed.errors import ConfigError, nearest
from fedmed.schema import from_dict
from strategies.coordinator.folder import CoordinatorError

RECORD, STOP, OUTPUT = "run.json", "stop", "output.log"
# pending: nobody works on it yet. failed: it could not go on, and can be resumed. refused: it would be again.
OPEN, ENDED = ("pending", "running"), ("finished", "failed", "refused", "stopped")


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """A run as it was launched, and what became of it.

    Attributes:
        overrides: the settings as they were typed.
        cwd: the folder that relative paths in them are seen from.
        state: one of `OPEN` or `ENDED`.
        detail: why, for a person.
        flower_run: its number at the SuperLink, once known.
    """

    overrides: list[str]
    cwd: str
    launched_at: float = field(default_factory=lambda: round(time.time(), 3))
    state: str = "pending"
    detail: str = ""
    flower_run: int | None = None


@dataclass(frozen=True, kw_only=True)
class Figures:
    """How far a run has come, as it wrote itself. Epsilon is that of the site that spent most (PLD)."""

    round: int = 0
    rounds: int | None = None
    epsilon: float | None = None
    private: bool | None = None


class RunPlace:
    """The folder of one of a coordinator's runs."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.name

    @property
    def output(self) -> Path:
        """What the run printed."""
        return self.path / OUTPUT

    @property
    def started(self) -> bool:
        """Whether there is something to resume."""
        return (self.path / "config.json").exists()

    def read(self) -> RunRecord:
        """The record.

        Raises:
            CoordinatorError: there is none, or it is damaged.
        """
        try:
            record = from_dict(RunRecord, json.loads((self.path / RECORD).read_text()))
        except (OSError, ValueError, TypeError, AttributeError, ConfigError):
            raise CoordinatorError(f"{self.path / RECORD}: missing or damaged") from None
        assert isinstance(record, RunRecord)
        return record

    def write(self, record: RunRecord) -> None:
        """Replace the record."""
        write_json(self.path / RECORD, dataclasses.asdict(record))

    def change(self, **values: Any) -> RunRecord:
        """Replace some of it."""
        record = dataclasses.replace(self.read(), **values)
        self.write(record)
        return record

    def stop(self) -> None:
        """Write down that a person wants it to stop."""
        (self.path / STOP).touch()

    def resume(self) -> None:
        """Take that back."""
        (self.path / STOP).unlink(missing_ok=True)

    @property
    def stop_wanted(self) -> bool:
        """Whether a person wants it to stop."""
        return (self.path / STOP).exists()

    def settings(self) -> list[str]:
        """What the run is to be started with: its own folder, once there is something to resume."""
        if self.started:
            return [setting("resume", str(self.path))]
        return [*self.read().overrides, setting("run_dir", str(self.path))]

    def figures(self) -> Figures:
        """How far it has come. What cannot be read counts as not there: it is being written, or was never."""
        rounds = _json(self.path / "config.json").get("rounds")
        summary = _json(self.path / "summary.json")
        if summary:
            done, spent = summary["rounds"], summary["privacy"]["sites"].values()
            epsilons = [site.get("epsilon") for site in spent if summary["privacy"]["private"]]
        else:
            history = self._history()
            done, epsilons = len(history), list(history[-1]["epsilon"].values()) if history else []
        known = [epsilon for epsilon in epsilons if epsilon is not None]
        private = bool(known) if done else None
        return Figures(round=done, rounds=rounds, epsilon=max(known, default=None), private=private)

    def _history(self) -> list[dict[str, Any]]:
        import safetensors

        try:
            with safetensors.safe_open(self.path / "checkpoint.safetensors", framework="numpy") as file:
                history: list[dict[str, Any]] = json.loads(file.metadata()["history"])
                return history
        except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError):
            return []


class RunPlaces:
    """All runs of a coordinator."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def all(self) -> list[RunPlace]:
        """Every run, the oldest first."""
        found = [RunPlace(path.parent) for path in self._folder.glob(f"*/{RECORD}")]
        return sorted(found, key=lambda place: (place.read().launched_at, place.name))

    def named(self, name: str) -> RunPlace:
        """The run of a name, or of the only one that begins so.

        Raises:
            ConfigError: there is none, or there are several.
        """
        names = {place.name: place for place in self.all()}
        found = [names[name]] if name in names else [names[full] for full in names if full.startswith(name)]
        if len(found) > 1:
            raise ConfigError(
                f"run '{name}': {len(found)} runs begin so: {', '.join(place.name for place in found)}"
            )
        if not found:
            raise ConfigError(
                f"run '{name}': no such run; {nearest(name, names) if names else 'there is none yet'}"
            )
        return found[0]

    def new(self, name: str, overrides: Sequence[str], cwd: Path) -> RunPlace:
        """A new run's folder, named by the time and `name`."""
        word = re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII).strip("-.") or "run"
        stem = f"{time.strftime('%Y%m%d-%H%M%S')}-{word}"
        for number in range(1, 1000):
            place = RunPlace(self._folder / (stem if number == 1 else f"{stem}-{number}"))
            try:
                place.path.mkdir(parents=True)
            except FileExistsError:
                continue
            place.write(RunRecord(overrides=list(overrides), cwd=str(cwd)))
            return place
        raise ConfigError(f"runs/{stem}: a thousand runs started in one second")


def setting(key: str, value: str) -> str:
    """KEY="VALUE" in Hydra's grammar, whatever is in the value."""
    # There a backslash is itself, but before a quote.
    quoted = re.sub(r'(\\*)("|$)', lambda found: found[1] * 2 + ('\\"' if found[2] else ""), value)
    return f'{key}="{quoted}"'


def _value(quoted: str) -> str:
    """The value that `setting` quoted."""
    return re.sub(r'(\\+)("|$)', lambda found: found[1][: len(found[1]) // 2] + found[2], quoted[1:-1])


def place_of(overrides: str, runs: Path) -> RunPlace | None:
    """The run's folder that settings name last, as `RunPlace.settings` wrote them; None: they name none."""
    try:
        key, _, value = shlex.split(overrides)[-1].partition("=")
        path = Path(_value(value))
        ours = key in ("resume", "run_dir") and path.parent.resolve() == runs and (path / RECORD).is_file()
    except (ValueError, IndexError, OSError):
        return None
    return RunPlace(path) if ours else None


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
