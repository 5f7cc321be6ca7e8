"""Where a run's figures go besides its folder. MLflow is imported when used."""

import importlib.util
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

from fedmed.atomic import write_bytes
from fedmed.config import RunConfig, TrackingConfig
from fedmed.errors import ConfigError
from fedmed.privacy.accounting import BINDING
from fedmed.privacy.plan import make_plan
from fedmed.schema import to_dict

# What only `resume` reads.
NOT_LOGGED = ("checkpoint.safetensors", "mlflow_run_id")


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

    Once started it never ends the training: what MLflow does not take is kept until the end, tried once more,
    and then left to the run folder, which holds it all.

    Args:
        warn: shows a person one line.
    """

    def __init__(self, config: TrackingConfig, warn: Callable[[str], None]) -> None:
        self._config = config
        self._warn = warn
        self._client: Any = None
        self._run_id = ""
        self._unsent: list[Any] = []
        self._failed = False

    def start(self, config: RunConfig, folder: Path) -> dict[str, str]:
        logging.getLogger("alembic").setLevel(logging.WARNING)
        # Read when MLflow is loaded: it would report its use to its makers.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        # A server that goes away would hold up a round for minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        from mlflow import MlflowClient

        logging.getLogger("mlflow").setLevel(logging.WARNING)
        saved = folder / "mlflow_run_id"
        earlier = saved.read_text().strip() if saved.exists() else ""
        try:
            self._client = MlflowClient(tracking_uri=self._config.uri)
            self._client.search_experiments(max_results=1)
            if earlier:
                self._client.update_run(earlier, status="RUNNING")
            else:
                write_bytes(saved, (self._create(config) + "\n").encode())
        # What is raised depends on the scheme: a database's driver has exceptions of its own, or is missing.
        except Exception as error:
            what = f"continue run {earlier} there" if earlier else "start a run there"
            raise _cannot(self._config.uri, f"MLflow cannot {what} ({type(error).__name__})") from None
        self._run_id = saved.read_text().strip()
        return {"uri": self._config.uri, "run_id": self._run_id}

    def _create(self, config: RunConfig) -> str:
        experiment = self._client.get_experiment_by_name(self._config.experiment)
        if experiment is None:
            root = Path("mlartifacts").resolve().as_uri() if self._config.uri.startswith("sqlite") else None
            experiment_id = self._client.create_experiment(self._config.experiment, artifact_location=root)
        else:
            experiment_id = experiment.experiment_id
        run = self._client.create_run(experiment_id, run_name=config.name)
        from mlflow.entities import Param

        # Declared columns are in config.json; as parameters they would fill pages.
        flat = [(key, value) for key, value in _flat(to_dict(config)) if not key.startswith("task.columns.")]
        params = [Param(_name(key), str(value)[:500]) for key, value in flat]
        for start in range(0, len(params), 100):
            self._client.log_batch(run.info.run_id, params=params[start : start + 100])
        # What must stand beside the metrics named epsilon.
        for site in config.task.declared_sizes if config.private else ():
            plan = make_plan(config, site)
            claim = f"{BINDING} accountant, delta {plan.delta:g}, {plan.adjacency}"
            self._client.set_tag(run.info.run_id, _name(f"epsilon.{BINDING}/{site}"), claim)
        reason = config.not_private_reason()
        self._client.set_tag(run.info.run_id, "privacy", f"NOT PRIVATE ({reason})" if reason else "private")
        return str(run.info.run_id)

    def log(self, metrics: dict[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._unsent += [Metric(_name(key), value, now, step) for key, value in metrics.items()]
        if self._failed:
            return
        try:
            self._send()
        except Exception as error:
            self._failed = True
            self._warn(
                f"MLflow does not take the figures ({type(error).__name__}); they are tried again at the end"
            )

    def _send(self) -> None:
        # MLflow takes at most 1,000 metrics at once.
        for start in range(0, len(self._unsent), 500):
            self._client.log_batch(self._run_id, metrics=self._unsent[start : start + 500])
        self._unsent.clear()

    def finish(self, folder: Path, *, ok: bool) -> None:
        if not self._run_id:
            return
        try:
            self._send()
            self._log_files(folder)
            self._client.set_terminated(self._run_id, status="FINISHED" if ok else "FAILED")
        except Exception as error:
            self._warn(f"MLflow did not take everything ({type(error).__name__}); it is all in {folder}")

    def _log_files(self, folder: Path) -> None:
        for file in sorted(folder.rglob("*")):
            # A dot begins the name of a draft that a crash left behind.
            if file.is_file() and file.name not in NOT_LOGGED and not file.name.startswith("."):
                inside = file.parent.relative_to(folder).as_posix()
                self._client.log_artifact(self._run_id, str(file), None if inside == "." else inside)


def check(config: TrackingConfig) -> None:
    """Raise `ConfigError` where MLflow is asked for and not installed, or nothing can be where it is to write.

    MLflow itself would try again for minutes.
    """
    if config.kind == "none":
        return
    if importlib.util.find_spec("mlflow") is None:
        raise ConfigError(
            "tracking=mlflow: MLflow is not installed; run: pip install 'fedmed[coordinator]', or set tracking=none"
        )
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


def make_tracker(config: TrackingConfig, warn: Callable[[str], None]) -> Tracker:
    """The tracker that a configuration names; `warn` shows a person what went wrong with it."""
    check(config)
    return MlflowTracker(config, warn) if config.kind == "mlflow" else NoTracker()


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, value in values.items():
        pairs += _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]
    return pairs
