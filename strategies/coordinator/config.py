"""`coordinator.yaml`: written with every option and what it means, read strictly."""

import dataclasses
import json
import textwrap
from dataclasses import dataclass
from pathlib import Path

import yaml  # type: ignore[import-untyped, unused-ignore]

from fedmed import strict_yaml
from fedmed.errors import ConfigError, require
from fedmed.schema import from_dict
from strategies.coordinator.certificates import alternative

HEADER = "What this coordinator is. A change takes effect with the next: fedmed coordinator start"


ABOUT = {
    "name": "The coordinator's name, for people.",
    "hosts": "The DNS names and IP addresses by which sites reach this machine. They stand in the server's "
    "certificate: after a change run fedmed coordinator rotate.",
    "listen": "The address of this machine on which sites are answered; 0.0.0.0: all of them.",
    "port": "The port, the only one that sites need to reach.",
    "runs_at_once": "How many runs may be under way at once; each holds a model in memory.",
    "mlflow": "Whether to start MLflow's server, on loopback, for those who look at figures.",
    "mlflow_port": "Its port.",
}


@dataclass(frozen=True, kw_only=True)
class CoordinatorConfig:
    """The options of a coordinator; `ABOUT` says what each means."""

    name: str
    hosts: list[str]
    listen: str = "0.0.0.0"
    port: int = 9092
    runs_at_once: int = 2
    mlflow: bool = True
    mlflow_port: int = 5000

    def __post_init__(self) -> None:
        word = 0 < len(self.name) <= 100 and self.name.isprintable()
        require(word, "name", self.name or "''", "1 to 100 printable characters")
        require(bool(self.hosts), "hosts", "[]", "at least one DNS name or IP address")
        for host in self.hosts:
            alternative(host)
        alternative(self.listen)
        for key in ("port", "mlflow_port"):
            require(1 <= getattr(self, key) <= 65535, key, getattr(self, key), "1 to 65535")
        require(self.port != self.mlflow_port, "mlflow_port", self.mlflow_port, "another number than port")
        require(self.runs_at_once >= 1, "runs_at_once", self.runs_at_once, ">= 1")


def render(config: CoordinatorConfig) -> str:
    """The text of a coordinator.yaml that gives this configuration: every option, above it what it means."""
    lines = [_comment(HEADER), ""]
    for option in dataclasses.fields(config):
        # JSON is YAML.
        value = json.dumps(getattr(config, option.name), ensure_ascii=False)
        lines += [_comment(ABOUT[option.name]), f"{option.name}: {value}", ""]
    return "\n".join(lines)


def read_config(path: Path) -> CoordinatorConfig:
    """The configuration in a file.

    Raises:
        ConfigError: the file cannot be read, is no YAML, or holds an unknown key or a value that may not stand there.
    """
    try:
        values = strict_yaml.parse(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, ValueError, TypeError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f" (line {mark.line + 1} or below)" if mark else ""
        raise ConfigError(f"{path}: not YAML in UTF-8, or a key stands twice{place}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected lines of KEY: VALUE")
    missing = {"name", "hosts"} - values.keys()
    if missing:
        raise ConfigError(f"{path}: {sorted(missing)[0]}: missing")
    try:
        config = from_dict(CoordinatorConfig, {str(key): value for key, value in values.items()})
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    assert isinstance(config, CoordinatorConfig)
    return config


def _comment(text: str) -> str:
    return textwrap.fill(text, width=100, initial_indent="# ", subsequent_indent="# ")
