"""Where networks compute."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fedmed import devices
from fedmed.devices import CPU, check, device_of, in_words, sent
from fedmed.errors import ConfigError

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _asked_anew() -> Iterator[None]:
    device_of.cache_clear()
    yield
    device_of.cache_clear()


def accelerators(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """As on a machine that has so many."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


def test_an_accelerator_is_used_by_the_same_rules_as_the_processor() -> None:
    """In a process of its own: PyTorch is told of another device (`tests/pretended`)."""
    line = [
        sys.executable,
        "-m",
        "pytest",
        "-o",
        "addopts=",
        "-p",
        "no:xdist",
        "-p",
        "no:cacheprovider",
        "--tb=short",
    ]
    ended = subprocess.run([*line, "tests/pretended/checks.py"], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout[-6000:] + ended.stderr[-2000:]
    passed = re.search(r"(\d+) passed", ended.stdout)
    assert passed is not None
    assert int(passed[1]) >= 25
    assert "skipped" not in ended.stdout


def test_without_an_accelerator_networks_compute_on_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerators(monkeypatch, 0)
    assert device_of("auto") == device_of("cpu") == CPU
    assert in_words(CPU) == "cpu"
    for name in ("cuda", "cuda:1"):
        for ask in (device_of, check):
            with pytest.raises(ConfigError, match=rf"^device={name}: .* set device to auto or cpu$"):
                ask(name)


def test_an_accelerator_is_taken_by_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerators(monkeypatch, 2)
    found = {name: device_of(name) for name in ("auto", "cpu", "cuda", "cuda:1")}
    first = torch.device("cuda", 0)
    assert found == {"auto": first, "cpu": CPU, "cuda": first, "cuda:1": torch.device("cuda", 1)}
    with pytest.raises(ConfigError, match=r"^device=cuda:2: PyTorch finds 2; expected cuda:0 to cuda:1$"):
        device_of("cuda:2")


def test_a_check_does_not_wake_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that was woken does not survive a fork: `is_available` wakes it, to count need not."""

    def woken() -> bool:
        raise AssertionError

    accelerators(monkeypatch, 1)
    monkeypatch.setattr(torch.cuda, "is_available", woken)
    for name in ("auto", "cpu", "cuda"):
        check(name)


def test_free_memory_counts_what_pytorch_holds_for_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (100, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 50)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 20)
    assert devices.free_bytes(torch.device("cuda", 0)) == 130


def test_on_the_processor_nothing_is_copied() -> None:
    values = torch.arange(6).view(3, 2)
    assert sent(values, CPU) is values
    assert sent(values, CPU, torch.tensor([2, 0])).tolist() == [[4, 5], [0, 1]]
