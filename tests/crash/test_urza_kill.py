"""A store whose process is killed in the middle of its puts has everything that it acknowledged, and no half."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from esper_ray.urza.store import Store

_WRITER = """
import json, struct, sys
from pathlib import Path
from esper_ray.contracts.ports import KernelSpec, SlotSignature
from esper_ray.urza.store import Store

store = Store(Path(sys.argv[1]))
spec = KernelSpec("BP009", SlotSignature("conv", (16, 24, 24)))
for number in range(100_000):
    data = struct.pack("<f", number) * 20_000
    text = json.dumps({"w": {"dtype": "F32", "shape": [20_000], "data_offsets": [0, len(data)]}}).encode()
    print(store.put(spec, struct.pack("<Q", len(text)) + text + data, {"number": number}).digest, flush=True)
"""


@pytest.mark.parametrize("kill_after", [1, 2, 7, 20])
def test_acknowledged_kernels_survive_a_kill(tmp_path: Path, kill_after: int) -> None:
    writer = subprocess.Popen(
        [sys.executable, "-c", _WRITER, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert writer.stdout is not None
    acknowledged = [writer.stdout.readline().strip() for _ in range(kill_after)]
    writer.kill()
    acknowledged += [line.strip() for line in writer.stdout if line.endswith("\n")]
    writer.wait()
    writer.stdout.close()
    store = Store(tmp_path)
    for digest in acknowledged:
        assert store.get_digest(digest).digest == digest
    report = store.verify()
    assert report.holds
    assert report.sound >= len(acknowledged)
    assert [row.version for row in store.list()] == list(range(1, report.sound + 1))
    store.close()
