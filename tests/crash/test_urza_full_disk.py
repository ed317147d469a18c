"""A store whose disk is really full refuses what is new, goes on serving, and stores again when there is room."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

_FULL = """
import json, subprocess, sys
from pathlib import Path
from esper_ray.errors import KernelMissing, StoreUnavailable
from esper_ray.urza.store import Store
from tests.urza_world import METADATA, file_of, spec, weights

disk = Path(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], check=True)
store = Store(disk / "urza", cache_bytes=0)
stored, refused = [], ""
for number in range(10_000):
    try:
        stored.append(store.put(spec(number), weights(*[float(number)] * 5_000), METADATA).digest)
    except StoreUnavailable as error:
        refused = str(error)
        break
served = all(store.get_digest(digest).digest == digest for digest in stored)
report = store.verify()
try:
    store.get(spec(number))
    lost = "served"
except KernelMissing:
    lost = "missing"
for digest in stored[:4]:
    file_of(store, digest).unlink()
healed = len(store.heal(store.verify().findings))
again = store.put(spec(number), weights(*[float(number)] * 5_000), METADATA)
print(json.dumps({
    "stored": len(stored), "refused": refused, "served": served, "sound": report.sound,
    "findings": len(report.findings), "lost": lost, "healed": healed,
    "again": store.get(spec(number)) == again, "after": len(store.verify().findings),
}))
"""


def _may_mount() -> bool:
    if shutil.which("unshare") is None:
        return False
    trial = ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/tmp"]
    return subprocess.run(trial, capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not _may_mount(), reason="no small disk can be mounted here")
def test_a_store_on_a_full_disk_serves_what_it_has_and_stores_again_when_there_is_room(tmp_path: Path) -> None:
    command = ["unshare", "-rm", sys.executable, "-c", _FULL, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["stored"] > 10
    assert "No space left" in found["refused"] or "full" in found["refused"]
    assert found["served"]
    assert (found["sound"], found["findings"]) == (found["stored"], 0)
    assert (found["lost"], found["healed"], found["again"], found["after"]) == ("missing", 4, True, 0)
