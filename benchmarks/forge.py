"""What making blocks costs, and what compiling them brings.

- ``cold_eager_s``, ``cold_s``: from an empty folder until every usable blueprint is built and checked for each slot,
  and until each is compiled and measured as well. ``first_kernel_s``: until the first of them can grow.
- ``warm_s``: a new process finds all of it finished, and Urza has compared every artifact with its digest.
- ``compiled_speedup_ratio_SLOT_BLUEPRINT``: a step (forward and backward, batch of 64, one thread) with the eager block
  over one with the compiled block, measured in turns. ``compiled_pays`` counts those above ``forge.speedup``.
- ``training_slowdown_percent``: how much longer a whole run in the full system takes beside a forge that has everything
  still to make, against a run beside one that has nothing to do; in turns, median over pairs, lockstep, so that both
  runs compute the same. ``training_cpu_percent`` is the same of the training process's processor time: what the forge
  does to caches and clock, without waiting for a processor.

Compiling takes half a minute of one processor for some blocks; both parts can be left out. The short form compiles one
block of each family, and trains hosts of half the width.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from benchmarks import common
from benchmarks.common import Bar
from esper_ray import config as configuration
from esper_ray.config import ForgeConfig
from esper_ray.contracts.enums import BlueprintTier
from esper_ray.contracts.ports import KernelSpec, SlotSignature
from esper_ray.contracts.signing import load_keys
from esper_ray.karn.catalog import CATALOG
from esper_ray.runtime import connect
from esper_ray.tezzeret.forge import Forge
from esper_ray.urza.store import Store

BARS = (Bar("warm_s", 5.0), Bar("training_slowdown_percent", 5.0))
QUICK_SLOTS = ("conv-32x12x12", "sequence-64x32")
SLOTS = ("conv-16x24x24", "conv-32x12x12", "conv-64x6x6", "sequence-64x32", "vector-64")
_USABLE = BlueprintTier.EXPERIMENTAL
_WARM = """
import sys
from pathlib import Path
from esper_ray.config import ForgeConfig
from esper_ray.contracts.signing import load_keys
from esper_ray.tezzeret.forge import Forge
from esper_ray.urza.store import Store

folder, strategy, names, compiled = Path(sys.argv[1]), sys.argv[2], *map(str.split, sys.argv[3:])
store = Store(folder / "urza")
forge = Forge(store, folder / "forge", ForgeConfig(strategy=strategy), keys=load_keys(folder / "keys"))
specs = forge.ordered(names)
assert not forge.build(specs).stopped
assert not forge.compile(forge.ordered(compiled)).stopped
report = store.verify()
assert report.holds and len({row.key for row in store.list()}) == len(specs), report
"""


def wanted(slots: Sequence[str], device: str) -> list[KernelSpec]:
    """Every usable blueprint for each slot."""
    signatures = [SlotSignature.parse(f"{slot}-float32-{device}") for slot in slots]
    return [
        each.spec(signature)
        for signature in signatures
        for each in CATALOG.query(signature, tier_ceiling=_USABLE, offer="wide").candidates
    ]


def _one_of_each_family(specs: Sequence[KernelSpec]) -> list[KernelSpec]:
    return list({CATALOG.get(spec.blueprint, tier_ceiling=_USABLE).family: spec for spec in specs}.values())


def catalogue(folder: Path, slots: Sequence[str], given: argparse.Namespace) -> dict[str, Any]:
    """Make everything from nothing, then find it made."""
    specs = wanted(slots, given.device)
    store = Store(folder / "urza")
    config = ForgeConfig(jobs=given.jobs, strategy=given.strategy)
    forge = Forge(store, folder / "forge", config, keys=load_keys(folder / "keys"), background=False)
    first: list[float] = []
    start = time.perf_counter()

    def follow(done: int, total: int, current: str) -> None:
        if done and not first:
            first.append(time.perf_counter() - start)
        if done % 10 == 0:
            common.console.print(f"{done} of {total} {current.partition('@')[0]}", style="dim")

    built = forge.build(specs, follow)
    eager_s = time.perf_counter() - start
    chosen = _one_of_each_family(specs) if given.quick else specs
    compiled = forge.compile(chosen, follow)
    cold_s = time.perf_counter() - start
    rows = {row.key: row for row in store.list()}
    forge.close()
    store.close()
    start = time.perf_counter()
    names = (" ".join(f"{spec.blueprint}@{spec.signature}" for spec in each) for each in (specs, chosen))
    arguments = [str(folder), given.strategy, *names]
    subprocess.run([sys.executable, "-c", _WARM, *arguments], check=True)
    warm_s = time.perf_counter() - start
    table = [_line(spec, rows[spec.key].metadata) for spec in specs if spec.key in rows]
    ratios = {f"compiled_speedup_ratio_{row['slot']}_{row['block']}": row["ratio"] for row in table if row["ratio"]}
    for key, why in {**built.given_up, **compiled.given_up}.items():
        common.console.print(f"{key} was given up: {why}", style="yellow")
    return {
        "kernels": len(specs),
        "kernels_compiled": len(chosen),
        "given_up": len(built.given_up) + len(compiled.given_up),
        "first_kernel_s": first[0],
        "cold_eager_s": eager_s,
        "cold_s": cold_s,
        "warm_s": warm_s,
        "compiled_pays": sum(row["strategy"] == "compiled" for row in table),
        "compiled_speedup_ratio_p50": statistics.median(ratios.values()) if ratios else 0.0,
        "compile_busy_s_p50": statistics.median(
            [row["compile_busy_s"] for row in table if row["compile_busy_s"]] or [0.0]
        ),
        **ratios,
        "tables": {"blocks": table},
    }


def _line(spec: KernelSpec, found: Any) -> dict[str, Any]:
    eager, compiled = found["eager_ms"], found.get("compiled_ms")
    return {
        "block": spec.blueprint,
        "name": found["name"],
        "slot": "-".join(str(spec.signature).split("-")[:2]),
        "eager_ms": eager,
        "compiled_ms": compiled,
        "ratio": eager / compiled if compiled else None,
        "compile_s": found.get("compile_seconds"),
        "compile_busy_s": found.get("compile_busy_seconds"),
        "strategy": found["strategy"],
    }


def slowdown(folder: Path, pairs: int, settings: Sequence[str]) -> dict[str, Any]:
    """Whole runs beside a forge with everything to do, and beside one with nothing, in turns."""
    warm = folder / "warm"
    _run(warm, [*settings, "run.epochs=2", "tamiyo.controller=never", "forge.compile=never"])
    walls, busy, left = [], [], 0
    for pair in range(pairs):
        seconds = {}
        for name in ("idle", "busy") if pair % 2 else ("busy", "idle"):
            home = folder / f"{name}-{pair}"
            if name == "idle":
                for part in ("urza", "forge", "keys"):
                    shutil.copytree(warm / part, home / part)
            more = ["forge.compile=never"] if name == "idle" else []
            seconds[name] = _run(home, [*settings, *more])
            common.console.print(f"{name}: {seconds[name]}", style="dim")
        walls.append(100.0 * (seconds["busy"]["wall"] / seconds["idle"]["wall"] - 1.0))
        busy.append(100.0 * (seconds["busy"]["cpu"] / seconds["idle"]["cpu"] - 1.0))
        left += seconds["busy"]["done"] < seconds["busy"]["total"]
    return {
        "training_slowdown_percent": statistics.median(walls),
        "training_cpu_percent": statistics.median(busy),
        "slowdown_pairs": pairs,
        "runs_that_ended_before_the_forge": left,
        "tables": {"slowdowns_percent": walls, "cpu_percent": busy},
    }


def _run(home: Path, settings: Sequence[str]) -> dict[str, float]:
    """Seconds of a run: wall time of its training, processor time of its process; how far the forge came."""
    config = configuration.load(None, [f"home={home}", "ray.namespace=forge", "nissa.port=0", *settings])
    with connect(config, say=lambda line: common.console.print(line, style="dim")) as session:
        actors = session.up()["actors"]
        tolaria = psutil.Process(actors["tolaria"]["pid"])
        before = sum(tolaria.cpu_times()[:2])
        final = session.wait(session.submit(config))
        progress = session.ask("tezzeret", "progress")
        result = json.loads((config.runs / final["run_id"] / "result.json").read_text())
        cpu = sum(tolaria.cpu_times()[:2]) - before
    in_compile = progress["phase"] == "compile"
    done = progress["done"] if in_compile else progress["total"] * (progress["phase"] == "done")
    return {"wall": result["wall_seconds"], "cpu": cpu, "done": done, "total": progress["total"]}


def measure(given: argparse.Namespace) -> dict[str, Any]:
    figures: dict[str, Any] = {"tables": {}}
    slots = given.slots or (QUICK_SLOTS if given.quick else SLOTS)
    short = ["run.epochs=12", "run.host_width=8"]
    parts = []
    with tempfile.TemporaryDirectory(prefix="esper-") as folder:
        if given.only != "slowdown":
            parts.append(catalogue(Path(folder), slots, given))
        if given.only != "catalogue":
            settings = ["run.mode=lockstep", *(short if given.quick else ["run.epochs=40"]), *given.set]
            parts.append(slowdown(Path(folder), given.pairs or (2 if given.quick else 6), settings))
    for part in parts:
        tables = part.pop("tables")
        figures["tables"] |= tables
        figures |= part
    return figures


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--only", choices=("catalogue", "slowdown"), help="one of the two parts")
    parser.add_argument("--pairs", type=int, default=0, help="pairs of runs for the slowdown")
    parser.add_argument("--slots", nargs="+", help="which slots blocks are made for, such as conv-32x12x12")
    parser.add_argument(
        "--set", nargs="+", default=[], help="settings of the runs for the slowdown", metavar="KEY=VALUE"
    )
    parser.add_argument("--jobs", type=int, default=2, choices=(1, 2), help="jobs at a time")
    parser.add_argument("--strategy", default="standard", choices=("fast", "standard", "aggressive"))
    parser.add_argument("--device", default="cpu", help="cpu or cuda: where the blocks run")
    given = parser.parse_args()
    common.run("forge", BARS, lambda: measure(given), given.json)


if __name__ == "__main__":
    main()
