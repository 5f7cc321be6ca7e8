"""A run's folder: configuration, plans, journal, checkpoint. What `resume` needs, whole at any instant."""

import contextlib
import dataclasses
import json
import os
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from safetensors.numpy import load_file

from fedmed.atomic import write_json, write_parts
from fedmed.config import RunConfig
from fedmed.errors import ConfigError
from fedmed.privacy.plan import PrivacyPlan
from fedmed.schema import from_dict, to_dict
from strategies.base import Arrays, State
from strategies.tensors import tensor_parts

CHECKPOINT = "checkpoint.safetensors"
RECEIPTS = "receipts.jsonl"
# The replies of the round that is under way.
REPLIES = "replies"
# What a finished run says of its cost, for people and for programs.
STATEMENTS = ("summary.json", "report.html", "MODEL_CARD.md")


@dataclass
class Progress:
    """Where a run stands after its last finished round."""

    round: int
    arrays: Arrays
    state: State = field(default_factory=dict)
    # The global adapters of the last rounds, oldest first, for `strategy.average_last`.
    recent: deque[Arrays] = field(default_factory=deque)
    history: list[dict[str, Any]] = field(default_factory=list)
    # Seconds of training and of everything so far, over all attempts.
    seconds: float = 0.0
    total_seconds: float = 0.0

    def hold(self, arrays: Arrays) -> None:
        """Go on with the same values that lie somewhere else in memory."""
        self.arrays = arrays
        if self.recent:
            self.recent[-1] = arrays

    def released(self) -> Arrays:
        """What is released: the mean of the last `strategy.average_last` global adapters (post-processing)."""
        recent = list(self.recent) or [self.arrays]
        means = {
            name: np.mean([arrays[name].astype(np.float64) for arrays in recent], axis=0)
            for name in self.arrays
        }
        return {name: np.asarray(mean, dtype=np.float32) for name, mean in means.items()}


class RunFolder:
    """The folder of one run. Rounds are journalled before they are sent: what was sent counts as spent."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, config: RunConfig, plans: dict[str, PrivacyPlan], *, run_id: str) -> "RunFolder":
        """A new folder with its configuration and plans, and the name under which the sites know the run.

        Raises:
            ConfigError: `run_dir` names a folder that holds a run already.
        """
        path = Path(config.run_dir) if config.run_dir else _free(Path("runs"), config.name)
        if (path / "config.json").exists():
            raise ConfigError(
                f"run_dir={path}: holds a run already; continue it with: fedmed run resume={path}"
            )
        path.mkdir(parents=True, exist_ok=True)
        folder = cls(path)
        folder._write_plans(plans, run_id)
        # Last: a folder with a configuration is one that can be resumed.
        write_json(path / "config.json", _kept(config))
        return folder

    def change(self, config: RunConfig, plans: dict[str, PrivacyPlan]) -> None:
        """Continue with another number of rounds: later resumptions go on with it, and charge for it.

        What an earlier end of the run said of its cost goes first.
        """
        if json.loads((self.path / "config.json").read_text())["rounds"] == config.rounds:
            return
        if self.metrics_asked():
            raise ConfigError(
                f"resume={self.path} rounds={config.rounds}: its private metrics have been drawn, which is done "
                "once per run; start a new run"
            )
        for name in (*STATEMENTS, "history.json"):
            (self.path / name).unlink(missing_ok=True)
        self._write_plans(plans, self.run_id)
        write_json(self.path / "config.json", _kept(config))

    def discard(self) -> None:
        """Take back `create`: nothing else that is in the folder is touched."""
        for name in ("config.json", "plans.json", "mlflow_run_id", RECEIPTS):
            (self.path / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.path.rmdir()

    def _write_plans(self, plans: dict[str, PrivacyPlan], run_id: str) -> None:
        sites = {site: to_dict(plan) for site, plan in plans.items()}
        write_json(self.path / "plans.json", {"run_id": run_id, "sites": sites})

    def plans(self) -> dict[str, PrivacyPlan]:
        """The plans under which the run started."""
        values = json.loads((self.path / "plans.json").read_text())["sites"]
        return {site: from_dict(PrivacyPlan, plan, where=f"plans.{site}") for site, plan in values.items()}

    @property
    def run_id(self) -> str:
        """The run's name at the sites: unlike the folder's name, no two runs anywhere share it."""
        return str(json.loads((self.path / "plans.json").read_text())["run_id"])

    def journal(self, **entry: Any) -> None:
        """Append one line and make it last before anything depends on it."""
        self._append("journal.jsonl", entry)

    def receive(self, site: str, head: str, signature: str) -> None:
        """Keep what a site's ledger ended with when it answered: a later truncation of it then shows."""
        self._append(RECEIPTS, {"site": site, "head": head, "signature": signature})

    def _append(self, name: str, entry: dict[str, Any]) -> None:
        with (self.path / name).open("ab") as file:
            # A torn last line goes, or it would spoil this one.
            file.truncate(len(self._whole_lines(name)))
            file.write(json.dumps({"time": round(time.time(), 3), **entry}).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def rounds_sent(self) -> int:
        """How many times a round has been sent to the sites, finished or not."""
        return self._events("round-sent")

    def sent_after(self, round: int) -> list[list[str]]:
        """The sites that each round after `round` was sent to, once for each time that one was."""
        entries = (json.loads(line) for line in self._whole_lines().splitlines())
        return [
            entry.get("sites", [])
            for entry in entries
            if entry["event"] == "round-sent" and entry["round"] > round
        ]

    def metrics_asked(self) -> bool:
        """Whether the sites have been asked for private metrics: these are then spent, whatever came back."""
        return self._events("metrics-sent") > 0

    def _events(self, name: str) -> int:
        return sum(json.loads(line)["event"] == name for line in self._whole_lines().splitlines())

    def _whole_lines(self, name: str = "journal.jsonl") -> bytes:
        """A file of lines without a torn last line, which was never acted on: a round is sent once its line lasts."""
        path = self.path / name
        content = path.read_bytes() if path.exists() else b""
        return content[: content.rfind(b"\n") + 1]

    def save(self, progress: Progress) -> None:
        """Write the checkpoint: arrays, strategy state and history in one atomic file."""
        tensors: dict[str, np.ndarray] = {f"arrays/{name}": value for name, value in progress.arrays.items()}
        tensors |= {f"state/{name}": np.asarray(value) for name, value in progress.state.items()}
        for index, arrays in enumerate(progress.recent):
            tensors |= {f"recent/{index}/{name}": value for name, value in arrays.items()}
        metadata = {
            "round": str(progress.round),
            "seconds": repr(progress.seconds),
            "total_seconds": repr(progress.total_seconds),
            "history": json.dumps(progress.history),
        }
        write_parts(self.path / CHECKPOINT, tensor_parts(tensors, metadata))

    def load(self) -> Progress | None:
        """The last finished round, or None before the first."""
        path = self.path / CHECKPOINT
        if not path.exists():
            return None
        tensors = load_file(path)
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata()
        recent: dict[int, Arrays] = {}
        progress = Progress(
            round=int(metadata["round"]),
            arrays={},
            history=json.loads(metadata["history"]),
            seconds=float(metadata["seconds"]),
            total_seconds=float(metadata["total_seconds"]),
        )
        for key, value in tensors.items():
            kind, _, name = key.partition("/")
            if kind == "arrays":
                progress.arrays[name] = value
            elif kind == "state":
                progress.state[name] = value
            else:
                index, _, name = name.partition("/")
                recent.setdefault(int(index), {})[name] = value
        progress.recent.extend(recent[index] for index in sorted(recent))
        return progress


def _kept(config: RunConfig) -> dict[str, Any]:
    return to_dict(dataclasses.replace(config, run_dir=None, resume=None))


def _free(parent: Path, name: str) -> Path:
    stem = f"{time.strftime('%Y%m%d-%H%M%S')}-{name}"
    for suffix in ("", *(f"-{index}" for index in range(2, 100))):
        if not (parent / (stem + suffix)).exists():
            return parent / (stem + suffix)
    raise ConfigError(f"runs/{stem}: a hundred runs started in one second; name them with run_dir=…")
