"""Where a run's figures go besides its folder. MLflow is imported when used."""

import contextlib
import importlib.util
import json
import logging
import os
import re
import socket
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from fedmed.atomic import write_bytes, write_json
from fedmed.config import RunConfig, TrackingConfig, run_config_from_dict
from fedmed.errors import ConfigError
from fedmed.schema import to_dict

# In a run's folder: what MLflow did not take, and how the run has ended, once it has.
KEPT = "mlflow_unsent.json"
# What only `resume` reads, or the coordinator.
NOT_LOGGED = ("checkpoint.safetensors", "mlflow_run_id", KEPT, "run.json", "stop")
# After how many seconds an MLflow that failed is tried again: twice as many each time.
FIRST_PAUSE, LONGEST_PAUSE = 30.0, 600.0
# Name, value, milliseconds since 1970, step.
Figure = tuple[str, float, int, int]


class Tracker(Protocol):
    """Receives what a run reports. Nothing here may hold a record's value."""

    def start(self, config: RunConfig, folder: Path) -> dict[str, str] | None:
        """Open (or continue) the run; where it can be looked at."""
        ...

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Log a round's figures."""
        ...

    def finish(self, folder: Path, *, ok: bool) -> None:
        """Log the folder's files and close the run."""
        ...


class NoTracker:
    """Tracks nothing: the run folder holds everything."""

    def start(self, config: RunConfig, folder: Path) -> None:
        del config, folder

    def log(self, metrics: dict[str, float], step: int) -> None:
        del metrics, step

    def finish(self, folder: Path, *, ok: bool) -> None:
        del folder, ok


class MlflowTracker:
    """An MLflow run, continued by `resume` under the same id.

    Once started it never ends the training: what MLflow does not take is kept in the run's folder, tried again from
    time to time and at the end, and by `send_kept` after that.

    Args:
        warn: shows a person one line.
        insist: whether a run that MLflow does not take at the start is refused.
    """

    def __init__(self, config: TrackingConfig, warn: Callable[[str], None], *, insist: bool = True) -> None:
        self._config, self._warn, self._insist = config, warn, insist
        self._client: Any = None
        self._run: RunConfig | None = None
        self._folder = Path()
        self._run_id = ""
        # Made by this process, and not yet described.
        self._made = ""
        self._unsent: list[Figure] = []
        self._failed = False
        self._next, self._pause = 0.0, FIRST_PAUSE

    def start(self, config: RunConfig, folder: Path) -> dict[str, str] | None:
        self._run, self._folder = config, folder
        self._unsent = [(*figure,) for figure in kept(folder).get("metrics", [])]
        if self._insist:
            self._connect()
        else:
            self._deliver()
        return {"uri": self._config.uri, "run_id": self._run_id} if self._run_id else None

    def _connect(self) -> None:
        """Open the run at MLflow, or make it.

        Raises:
            ConfigError: it cannot be.
        """
        assert self._run is not None
        logging.getLogger("alembic").setLevel(logging.WARNING)
        # Read when MLflow is loaded: it would report its use to its makers.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
        # A server that goes away would hold up a round for minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        from mlflow import MlflowClient

        logging.getLogger("mlflow").setLevel(logging.WARNING)
        saved = self._folder / "mlflow_run_id"
        earlier = saved.read_text().strip() if saved.exists() else ""
        try:
            self._client = MlflowClient(tracking_uri=self._config.uri)
            self._client.search_experiments(max_results=1)
            if earlier:
                self._client.update_run(earlier, status="RUNNING")
            else:
                write_bytes(saved, (self._create(self._run) + "\n").encode())
        # What is raised depends on the scheme: a database's driver has exceptions of its own, or is missing.
        except Exception as error:
            what = f"continue run {earlier} there" if earlier else "start a run there"
            raise _cannot(self._config.uri, f"MLflow cannot {what} ({type(error).__name__})") from None
        self._run_id = saved.read_text().strip()

    def _create(self, config: RunConfig) -> str:
        if not self._made:
            experiment = self._client.get_experiment_by_name(self._config.experiment)
            if experiment is None:
                local = self._config.uri.startswith("sqlite")
                root = Path("mlartifacts").resolve().as_uri() if local else None
                experiment_id = self._client.create_experiment(
                    self._config.experiment, artifact_location=root
                )
            else:
                experiment_id = experiment.experiment_id
            self._made = str(self._client.create_run(experiment_id, run_name=config.name).info.run_id)
        from mlflow.entities import Param

        # Seconds that a coordinator, which only looks for what is kept, need not spend.
        from fedmed.privacy.accounting import BINDING
        from fedmed.privacy.plan import make_plan

        # Declared columns are in config.json; as parameters they would fill pages.
        flat = [(key, value) for key, value in _flat(to_dict(config)) if not key.startswith("task.columns.")]
        params = [Param(_name(key), str(value)[:500]) for key, value in flat]
        for start in range(0, len(params), 100):
            self._client.log_batch(self._made, params=params[start : start + 100])
        # What must stand beside the metrics named epsilon.
        for site in config.task.declared_sizes if config.private else ():
            plan = make_plan(config, site)
            claim = f"{BINDING} accountant, delta {plan.delta:g}, {plan.adjacency}"
            self._client.set_tag(self._made, _name(f"epsilon.{BINDING}/{site}"), claim)
        reason = config.not_private_reason()
        self._client.set_tag(self._made, "privacy", f"NOT PRIVATE ({reason})" if reason else "private")
        return self._made

    def log(self, metrics: dict[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        self._unsent += [(_name(key), value, now, step) for key, value in metrics.items()]
        if time.monotonic() < self._next:
            self._keep()
        else:
            self._deliver()

    def _deliver(self) -> bool:
        """Send what is unsent, or keep it; whether MLflow took it."""
        try:
            self._send()
        except Exception as error:
            if not self._failed:
                self._warn(
                    f"MLflow does not take the figures ({_reason(error)}); they are kept in the run's folder, and "
                    "tried again"
                )
            self._failed = True
            self._next = time.monotonic() + self._pause
            self._pause = min(2 * self._pause, LONGEST_PAUSE)
            self._keep()
            return False
        if self._failed:
            self._warn("MLflow takes the figures again; it has them all")
        self._failed, self._pause = False, FIRST_PAUSE
        return True

    def _send(self) -> None:
        if not self._run_id:
            # At once, where nobody listens.
            check(self._config)
            self._connect()
        from mlflow.entities import Metric

        metrics = [Metric(*figure) for figure in self._unsent]
        # MLflow takes at most 1,000 metrics at once. One that it has already, it does not take twice.
        for start in range(0, len(metrics), 500):
            self._client.log_batch(self._run_id, metrics=metrics[start : start + 500])
        self._unsent.clear()
        (self._folder / KEPT).unlink(missing_ok=True)

    def _keep(self, ended: str | None = None) -> None:
        # A full disk ends no training either; they are still in memory.
        with contextlib.suppress(OSError):
            write_json(self._folder / KEPT, {"metrics": self._unsent, "ended": ended})

    def finish(self, folder: Path, *, ok: bool) -> None:
        if self._run is None or (self._insist and not self._run_id):
            return
        status = "FINISHED" if ok else "FAILED"
        try:
            self._send()
            self._log_files(folder)
            self._client.set_terminated(self._run_id, status=status)
        except Exception as error:
            # A run that left nothing behind has no folder.
            if (folder / "config.json").exists():
                self._keep(status)
            self._warn(f"MLflow did not take everything ({_reason(error)}); it is all in {folder}")

    def _log_files(self, folder: Path) -> None:
        for file in sorted(folder.rglob("*")):
            # A dot begins the name of a draft that a crash left behind.
            if file.is_file() and file.name not in NOT_LOGGED and not file.name.startswith("."):
                inside = file.parent.relative_to(folder).as_posix()
                self._client.log_artifact(self._run_id, str(file), None if inside == "." else inside)


def kept(folder: Path) -> dict[str, Any]:
    """What the run in a folder keeps for MLflow: its metrics, and how it ended, or None. Empty: nothing."""
    try:
        values = json.loads((folder / KEPT).read_text())
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def send_kept(folder: Path, warn: Callable[[str], None]) -> bool:
    """Send MLflow what a run that is over kept for it; whether it took everything.

    Raises:
        ConfigError: the folder holds no run.
    """
    try:
        config = run_config_from_dict(json.loads((folder / "config.json").read_text()))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder}: no run there ({type(error).__name__})") from None
    ok = kept(folder).get("ended") == "FINISHED"
    tracker = MlflowTracker(config.tracking, warn, insist=False)
    tracker.start(config, folder)
    tracker.finish(folder, ok=ok)
    return not (folder / KEPT).exists()


def check(config: TrackingConfig, *, reach: bool = True) -> None:
    """Raise `ConfigError` where MLflow is asked for and not installed, or nothing can be where it is to write.

    MLflow itself would try again for minutes.

    Args:
        reach: also look whether somebody answers there.
    """
    if config.kind == "none":
        return
    if importlib.util.find_spec("mlflow") is None:
        raise ConfigError(
            "tracking=mlflow: MLflow is not installed; run: pip install 'fedmed[coordinator]', or set tracking=none"
        )
    if not reach:
        return
    scheme, _, place = config.uri.partition("://")
    try:
        if scheme == "sqlite":
            _check_database(Path(place.removeprefix("/")))
        elif scheme in ("http", "https"):
            address = urlsplit(config.uri)
            port = address.port or (443 if scheme == "https" else 80)
            socket.create_connection((address.hostname or "", port), timeout=10).close()
    except (OSError, ValueError, sqlite3.Error) as error:
        raise _cannot(config.uri, f"cannot be reached ({error})") from None


def _check_database(path: Path) -> None:
    """Raise an error where a database can neither be read nor be made; makes nothing."""
    if path.is_dir():
        raise IsADirectoryError("it is a folder")
    if path.exists():
        connection = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)
        try:
            connection.execute("PRAGMA schema_version")
        finally:
            connection.close()
        return
    existing = next(folder for folder in path.resolve().parents if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise PermissionError(f"{existing} is no folder to write in")


def _cannot(uri: str, reason: str) -> ConfigError:
    return ConfigError(
        f"tracking.uri={uri}: {reason}; expected e.g. sqlite:///mlruns.db or http://127.0.0.1:5000, or tracking=none"
    )


def _name(key: str) -> str:
    """A name that MLflow takes: a site may be called St. Mary's."""
    return re.sub(r"[^\w/. :-]", "_", key)


def make_tracker(config: TrackingConfig, warn: Callable[[str], None], *, insist: bool = True) -> Tracker:
    """The tracker that a configuration names; `warn` shows a person what went wrong with it.

    Args:
        insist: whether an MLflow that cannot be reached now is an error; else its figures are sent later.
    """
    check(config, reach=insist)
    return MlflowTracker(config, warn, insist=insist) if config.kind == "mlflow" else NoTracker()


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, ConfigError) else type(error).__name__


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, value in values.items():
        pairs += _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]
    return pairs
