"""A store whose process is killed in the middle of its writes has everything that it acknowledged, and no half."""

from __future__ import annotations

import contextlib
import random
import subprocess
import sys
from pathlib import Path

import pytest

from esper_ray.errors import KernelMissing
from esper_ray.urza.store import Store
from tests.urza_world import METADATA, spec, weights

_WRITER = """
import sys
from pathlib import Path
from esper_ray.urza.store import Store
from tests.urza_world import METADATA, file_of, spec, weights

print("begin", flush=True)
store = Store(Path(sys.argv[1]))
for number in range(int(sys.argv[2]), 100_000):
    kernel = store.put(spec(number % 5), weights(*[float(number)] * 2_000), METADATA)
    print("stored", kernel.digest, flush=True)
    if number % 4 == 3:
        print("doomed", kernel.digest, flush=True)
        file_of(store, kernel.digest).unlink()
        store.heal(store.verify().findings)
        print("withdrawn", kernel.digest, flush=True)
"""
_LINES, _SECONDS = 12, 0.03


def kill_a_writer(folder: Path, life: int, lines: int, seconds: float) -> list[list[str]]:
    """Let one write until it said so many lines and for some time more, kill it, and give all that it had said."""
    command = [sys.executable, "-c", _WRITER, str(folder), str(1000 * life)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "begin\n"
        begun = "".join(writer.stdout.readline() for _ in range(lines))
        with contextlib.suppress(subprocess.TimeoutExpired):
            writer.wait(seconds)
        writer.kill()
        said = begun + writer.stdout.read()
    assert writer.returncode == -9, "it ended by itself"
    return [line.split() for line in said.split("\n")[:-1]]


def look(folder: Path, said: list[list[str]]) -> None:
    """Hold what is there against all that was said by all writers of this folder so far."""
    store = Store(folder)
    doomed = {digest for word, digest in said if word == "doomed"}
    assert {found.digest for found in store.recovered} <= doomed
    report = store.verify()
    assert report.holds, report
    for word, digest in said:
        if word == "stored" and digest not in doomed:
            assert store.get_digest(digest).digest == digest
        elif word == "withdrawn":
            with pytest.raises(KernelMissing):
                store.get_digest(digest)
    rows = store.list()
    for key in {row.key for row in rows}:
        taken = [row.version for row in rows if row.key == key]
        taken += [gone.version for gone in store.withdrawals() if gone.key == key]
        assert sorted(taken) == list(range(1, len(taken) + 1)), "a version's number was given twice, or left out"
    kernel = store.put(spec(9), weights(len(said)), METADATA)
    assert store.get(spec(9)) == kernel
    store.close()


def kill_at_random(folder: Path, kills: int, seed: int) -> int:
    """Writers die one after the other, twenty in each folder; how many artifacts they had acknowledged."""
    chance, stored = random.Random(seed), 0
    for number in range(kills):
        place = folder / str(number // 20)
        if number % 20 == 0:
            said: list[list[str]] = []
        said += kill_a_writer(place, number % 20, chance.randint(0, _LINES), chance.uniform(0.0, _SECONDS))
        look(place, said)
        stored += sum(word == "stored" for word, _ in said) if number % 20 == 19 or number == kills - 1 else 0
    return stored


def test_acknowledged_kernels_survive_kills_at_random_points(tmp_path: Path) -> None:
    assert kill_at_random(tmp_path, 10, seed=1) > 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_acknowledged_kernels_survive_300_kills_at_random_points(tmp_path: Path) -> None:
    assert kill_at_random(tmp_path, 300, seed=2) > 300
