"""The same two apps through `flwr run .` on Ray give what the in-process Grid gives."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.commands import heavy

ROOT = Path(__file__).parents[1]
SETTINGS = "model=logistic task=heart10 rounds=2 privacy=off tracking=none"


@pytest.fixture
def flower(tmp_path: Path) -> Iterator[dict[str, str]]:
    """An environment with a Flower home of its own; the SuperLink that Flower leaves running is ended."""
    home = tmp_path / "flwr"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {
        "FLWR_HOME": str(home),
        "PATH": path,
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
    yield environment
    for process in psutil.process_iter():
        try:
            ours = process.environ().get("FLWR_HOME") == str(home)
        except psutil.Error:
            continue
        if ours and process.pid != os.getpid():
            process.send_signal(signal.SIGTERM)


@pytest.mark.timeout(280)
def test_flwr_run_gives_the_bits_of_the_in_process_grid(tmp_path: Path, flower: dict[str, str]) -> None:
    ray, local = tmp_path / "ray", tmp_path / "local"
    out = subprocess.run(
        # One process plays the sites in turn: each takes seconds to import what it needs.
        ["flwr", "run", ".", "--stream", "--federation-config",
         f"num-supernodes=4 client-resources-num-cpus={os.cpu_count()}",
         "--run-config", f"overrides='{SETTINGS} run_dir={ray}'"],
        cwd=ROOT, env=flower, capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    assert (ray / "summary.json").exists(), out.stdout[-3000:] + out.stderr[-3000:]
    ended = heavy()("run", *SETTINGS.split(), f"run_dir={local}", cwd=tmp_path)
    assert ended.code == 0, ended.err
    name = Path("adapter") / "adapter.safetensors"
    assert (ray / name).read_bytes() == (local / name).read_bytes()
    # The bundle that travelled holds no code: both ends ran what is installed.
    bundles = list((Path(flower["FLWR_HOME"]) / "apps").iterdir())
    assert bundles
    assert {f.suffix for b in bundles for f in b.rglob("*") if f.is_file()} <= {".toml", ".md"}
