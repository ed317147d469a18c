"""After a power cut at any point of its writes a store has what it acknowledged, old or new, and nothing by half."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from esper_ray.errors import KernelMissing
from esper_ray.urza.store import Store
from tests import power_cut
from tests.urza_world import METADATA, spec, weights

_WRITER = """
import json, sys
from pathlib import Path
from esper_ray.urza.checks import Finding
from esper_ray.urza.store import Store
from tests.urza_world import METADATA, file_of, spec, weights

def say(word, kernel):
    print(json.dumps([word, kernel.spec.key, kernel.digest]), flush=True)

folder = Path(sys.argv[1]) / "urza"
store = Store(folder)
for number in (0, 1, 0):
    say("stored", store.put(spec(number), weights(*range(200), number, len(store.list())), METADATA))
store.close()
store = Store(folder)
doomed = store.put(spec(2), weights(2), METADATA)
say("stored", doomed)
say("doomed", doomed)
file_of(store, doomed.digest).unlink()
store.heal(store.verify().findings)
say("withdrawn", doomed)
say("stored", store.put(spec(2), weights(3), METADATA))
store.close()
"""
pytestmark = pytest.mark.skipif(not power_cut.possible(), reason="strace cannot record here")


def newest(said: list[list[str]]) -> dict[str, str]:
    """The digest acknowledged last for each kernel."""
    found: dict[str, str] = {}
    for word, key, digest in said:
        if word == "stored":
            found[key] = digest
        elif found.get(key) == digest:
            del found[key]
    return found


def look(cut: power_cut.Cut, everything: list[list[str]], folder: Path) -> None:
    """Open what the cut left, and hold it against what had been acknowledged."""
    said = [json.loads(line) for line in cut.said]
    doomed = {digest for word, _, digest in everything if word == "doomed"}
    known = {digest for _, _, digest in everything}
    store = Store(folder / "urza")
    assert {found.digest for found in store.recovered} <= doomed, "a row was there before its file"
    report = store.verify()
    assert report.holds, report
    rows = store.list()
    assert {row.digest for row in rows} <= known
    for key, digest in newest(said).items():
        if digest in doomed:
            continue
        versions = [row.digest for row in rows if row.key == key]
        assert digest in versions, f"{key} was acknowledged and is lost"
        kernel = store.get_digest(digest)
        assert (kernel.digest, kernel.spec.key) == (digest, key)
        later = [other for word, name, other in everything[len(said) :] if (word, name) == ("stored", key)]
        assert store.get(kernel.spec).digest in (digest, *later), "neither the old nor the new"
    for digest in (digest for word, _, digest in said if word == "withdrawn"):
        with pytest.raises(KernelMissing):
            store.get_digest(digest)
    again = store.put(spec(5), weights(5), METADATA)
    assert store.get(spec(5)) == again
    store.close()


@pytest.mark.timeout(300)
def test_a_power_cut_leaves_the_old_or_the_new_and_never_half(tmp_path: Path) -> None:
    disk, trace, folder = tmp_path / "disk", tmp_path / "trace", tmp_path / "after"
    disk.mkdir()
    power_cut.record(_WRITER, disk, trace)
    found = list(power_cut.cuts(trace, disk, seed=1))
    everything = [json.loads(line) for line in found[-1].said]
    assert [word for word, _, _ in everything].count("stored") == 5
    for number, cut in enumerate(found):
        cut.restore(folder)
        try:
            look(cut, everything, folder)
        except Exception as error:
            raise AssertionError(f"cut {number} of {len(found)}, {cut.how}, after {cut.after}") from error
    assert len(found) > 100


def test_the_disk_forgets_what_was_not_synced(tmp_path: Path) -> None:
    """The model itself: each omission that a program can make is seen."""
    program = """
import os, sys
from pathlib import Path
root = Path(sys.argv[1])
(root / "inner").mkdir()
with (root / "inner" / "kept").open("wb") as file:
    file.write(b"old")
    file.flush()
    os.fsync(file.fileno())
    for folder in (root / "inner", root):
        fd = os.open(folder, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
    file.seek(0)
    os.pwrite(file.fileno(), b"new", 0)
with (root / "unnamed").open("wb") as file:
    file.write(b"content")
    file.flush()
    os.fsync(file.fileno())
os.rename(root / "inner" / "kept", root / "inner" / "renamed")
print("done", flush=True)
"""
    disk, trace = tmp_path / "disk", tmp_path / "trace"
    disk.mkdir()
    power_cut.record(program, disk, trace)
    last = {cut.how: cut.files for cut in power_cut.cuts(trace, disk, seed=1)}
    files = {
        how: {str(path): content for path, content in found.items() if content is not None}
        for how, found in last.items()
    }
    assert files["nothing unsynced"] == {"inner/kept": b"old"}
    assert files["names only"] == {"inner/renamed": b"old", "unnamed": b"content"}
    assert files["content only"] == {"inner/kept": b"new"}
    assert files["everything"] == {"inner/renamed": b"new", "unnamed": b"content"}
