"""Updates that are large beside a machine's memory: what a site needs to take one in and send one back."""

import os
import subprocess
import sys
import time
from collections import OrderedDict
from pathlib import Path

import numpy as np
import psutil
import pytest
from flwr.app import Array, ArrayRecord, Message, MessageType, RecordDict

from tests.conftest import count
from tests.evidence import figure
from tests.fedmed.flower.network import Network, beating, new_key, pem_of, write_key

ROOT = Path(__file__).parents[3]
SITES = 2


@pytest.mark.timeout(1200)
def test_a_large_update_passes_and_a_site_needs_three_times_its_size(tmp_path: Path) -> None:
    payload, arrays = count(40, 500) * 1_000_000, 10
    network = Network(tmp_path)
    network.start()
    sites = []
    try:
        for number in range(SITES):
            key = new_key()
            network.control().register(f"s{number}", pem_of(key))
            write_key(tmp_path / f"key{number}", key)
            files = [str(tmp_path / name) for name in ("ca.pem", f"key{number}", f"node{number}")]
            line = [sys.executable, "-m", "tests.fedmed.flower.site_process", network.address, *files, "2"]
            pipe = subprocess.PIPE
            sites.append(subprocess.Popen(line, cwd=ROOT, stdin=pipe, stdout=pipe, text=True, env=os.environ))
        for site in sites:
            assert site.stdout is not None
            assert site.stdout.readline() == "connected\n"
        task = network.task()
        task.begin()
        grid = network.grid(task)
        rng = np.random.default_rng(0)
        values = {f"w{n}": rng.random(payload // arrays // 4, dtype=np.float32) for n in range(arrays)}
        assert network.process is not None
        superlink = psutil.Process(network.process.pid)
        idle, most, seconds = superlink.memory_info().rss, 0, []
        with beating(task):
            for _ in range(2):
                began = time.monotonic()
                content = RecordDict(
                    {"arrays": ArrayRecord(OrderedDict((k, Array(v)) for k, v in values.items()))}
                )
                messages = [Message(content, node, MessageType.TRAIN) for node in grid.sites().values()]
                for reply in grid.gather(messages, timeout=600):
                    got = reply.content["arrays"]
                    assert all(np.array_equal(-values[name], got[name].numpy()) for name in values)  # type: ignore[union-attr, index]
                    most = max(most, superlink.memory_info().rss)
                seconds.append(time.monotonic() - began)
        task.finish(ok=True, details="")
        for site in sites:
            out, _ = site.communicate(timeout=60)
            before, after = map(int, out.split())
            figure(
                f"site's peak for {payload / 1e6:.0f} MB, in payloads", f"{(after - before) / payload:.2f}"
            )
            # It holds what it has taken in once at least.
            assert payload <= after - before <= 3 * payload
    finally:
        for site in sites:
            site.kill()
        network.end()
    figure(f"SuperLink's memory beside {SITES} x {payload / 1e6:.0f} MB, MB", f"{(most - idle) / 1e6:.0f}")
    figure(f"seconds a round of {payload / 1e6:.0f} MB down and up", f"{min(seconds):.1f}")
