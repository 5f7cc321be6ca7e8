"""What many tests share: tiny models saved to disk, and small declared tables."""

import gc
import hashlib
import os
import random
import secrets
import signal
import tempfile
import threading
import tomllib
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# Before torch is imported anywhere: one thread, as every worker process has.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

from tests import evidence, kept, readers
from tests.commands import same_key
from tests.evidence import count as count

PROJECT = Path(__file__).parent.parent / "pyproject.toml"
# What `make test-full` runs, one after the other: what is named on the command line, and in the summary's file.
PARTS = {(): "", ("tests/long",): "-long", ("tests/system",): "-system"}


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker of pytest-xdist sends its evidence to the process that started it."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["evidence"] = evidence.collected()


def pytest_collection_finish() -> None:
    """What is imported stays: the collector need not go through it again and again, here and in every fork."""
    gc.collect()
    gc.freeze()


class _Workers:
    """What only pytest-xdist calls."""

    def pytest_testnodedown(self, node: Any) -> None:
        evidence.merge(getattr(node, "workeroutput", {}).get("evidence", {"counts": {}, "figures": {}}))


def pytest_configure(config: pytest.Config) -> None:
    if kept.FOLDER not in os.environ:
        # The workers of pytest-xdist are started later, and find it.
        folder = tempfile.TemporaryDirectory(prefix="fedmed-kept-", ignore_cleanup_errors=True)
        config.add_cleanup(folder.cleanup)
        os.environ[kept.FOLDER] = folder.name
    # The process that starts the workers of pytest-xdist runs no test.
    if not getattr(config.option, "numprocesses", None):
        kept.keep()
    if config.pluginmanager.hasplugin("xdist"):
        config.pluginmanager.register(_Workers())


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Write the summary of each part of `make test-full`; of a few tests of it, none."""
    options = terminalreporter.config.option
    part = PARTS.get(tuple(options.file_or_dir))
    if evidence.FULL and part is not None and not options.keyword:
        stats = terminalreporter.stats
        outcomes = {
            name: len(stats.get(name, []))
            for name in ("passed", "failed", "error", "skipped", "xfailed")
            if stats.get(name)
        }
        terminalreporter.write_line(f"summary: {evidence.write(outcomes, part)}")


@pytest.fixture(scope="session", autouse=True)
def _whole_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """For fixtures of a module or of the session, which are made before those of a test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDMED_HOME", str(tmp_path_factory.mktemp("fedmed-home")))
        patch.setattr(
            "fedmed.data.split.secrets", SimpleNamespace(token_bytes=same_key, token_hex=secrets.token_hex)
        )
        # As this checkout registers them, whichever is installed.
        registered = tomllib.loads(PROJECT.read_text())["project"]["entry-points"]["fedmed.commands"]
        entries = [EntryPoint(name, value, "fedmed.commands") for name, value in registered.items()]
        patch.setattr("fedmed.cli.main.entry_points", lambda group: entries if group else [])
        if not evidence.FULL:
            patch.setattr("fedmed.dicom.workers.subprocess", readers.FORKS)
        yield


@pytest.fixture(autouse=True)
def _own_home(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Site keys of a test stay in its folder, and are the same each time: they say who is held out."""
    monkeypatch.setenv("FEDMED_HOME", str(tmp_path / "fedmed-home"))
    draws = random.Random(request.node.nodeid)
    keys = SimpleNamespace(token_bytes=draws.randbytes, token_hex=secrets.token_hex)
    monkeypatch.setattr("fedmed.data.split.secrets", keys)


if threading.current_thread() is threading.main_thread():
    # A shell that starts the tests in the background has them, and all that they start, ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _umask() -> Iterator[None]:
    """A process that starts to serve closes what it writes to others; the tests' own process goes on."""
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots that nobody looks at take longer than the rounds."""
    monkeypatch.setattr("strategies.run.write_report", lambda *_: None)


WORDS = """middle aged age old older elderly young adult male female typical atypical angina chest pain non cardiac
no symptoms blood pressure normal elevated abnormal high cholesterol borderline not measured fasting sugar resting
ecg recorded with st t changes left ventricular hypertrophy poor reduced good excellent exercise heart rate capacity
causes without depression slight severe upsloping flat downsloping segment slope blocked vessels vessel one two three
examined scan fixed reversible defect"""


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of 4 blocks and width 32 with a word tokenizer, saved as transformers saves it."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("bert")
    vocabulary = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        ",",
        ".",
        *WORDS.split(),
        *map(str, range(300)),
    ]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=4, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=64,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return folder


def sha256(path: Path) -> str:
    """The digest that a model configuration pins."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="session")
def hf_overrides(bert_folder: Path) -> list[str]:
    """The settings that select the tiny BERT through the real path."""
    return [
        "model=hf",
        f"model.path={bert_folder}",
        f"model.sha256={sha256(bert_folder / 'model.safetensors')}",
        "model.max_tokens=32",
    ]
