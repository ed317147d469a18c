"""Does growing help? Paired by random seed: a grown model against the same host alone and the final size from scratch.

Same data, data order, schedule and boundaries. The final-size model is trained from scratch for as many FLOPs as the
grown run was charged, its shadow passes and measurements included. The test split is read once for each run.

    python -m benchmarks.growth --quick --json growth.json     5 seeds, at most 20 minutes on 2 cores

Runs are kept in a folder (--home), by the code and the settings they were made with; what is there is not done again,
so an interrupted study goes on where it was.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.progress import Progress

import esper_ray
from benchmarks import common
from benchmarks.common import Bar
from esper_ray.reliability.ids import digest
from esper_ray.reliability.intervals import interval

BARS = (Bar("gain_points_mean", 0.0, above=True), Bar("gain_points_ci_low", 0.0, above=True))
ARMS = ("grown", "host", "final")


def work(home: Path, seed: int, arm: str, settings: Sequence[str]) -> dict[str, Any]:
    """One run, in this process with one thread; its result from the folder when it was done before."""
    import torch

    from esper_ray import config as configuration
    from esper_ray import inprocess
    from esper_ray.tolaria.trainer import Block, RunRequest, Trainer

    config = configuration.load(None, [f"home={home}", "run.mode=lockstep", f"run.seed={seed}", *settings])
    name = f"seed{seed}-{arm}"
    done = config.runs / name / "result.json"
    if done.exists():
        return dict(json.loads(done.read_text()))
    torch.set_num_threads(1)
    request = RunRequest(name, config, arm=arm, resume=True)
    if arm == "final":
        grown = json.loads((config.runs / f"seed{seed}-grown" / "result.json").read_text())
        blocks = tuple(map(Block.of, grown["blocks"]))
        request = RunRequest(name, config, arm=arm, resume=True, blocks=blocks, flops=grown["flops"])
    return Trainer(request, inprocess.surroundings(config)).run()


def pair(home: Path, seed: int, settings: Sequence[str], arms: Sequence[str]) -> dict[str, dict[str, Any]]:
    """All arms of one seed, one after the other, each in a process of its own."""
    results = {}
    for arm in arms:
        command = [sys.executable, "-m", "benchmarks.growth", "--one", str(seed), arm, "--home", str(home)]
        command += [part for setting in settings for part in ("--set", setting)]
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        if answer.returncode:
            raise SystemExit(f"seed {seed}, arm {arm} failed:\n{answer.stderr[-2000:]}")
        results[arm] = json.loads(answer.stdout.splitlines()[-1])
    return results


def study(home: Path, seeds: int, settings: Sequence[str], arms: Sequence[str], parallel: int) -> dict[str, Any]:
    """Run every pair and compare."""
    with Progress(console=common.console) as progress, ThreadPoolExecutor(parallel) as pool:
        task = progress.add_task(f"{seeds} seeds x {len(arms)} arms", total=seeds)
        futures = [pool.submit(pair, home, seed, settings, arms) for seed in range(seeds)]
        rows = []
        for future in futures:
            rows.append(future.result())
            progress.advance(task)
    return figures_of(rows)


def figures_of(rows: Sequence[Mapping[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """Means and intervals of the paired differences, in points of test accuracy."""
    figures: dict[str, Any] = {"seeds": len(rows)}
    for arm in rows[0]:
        figures[f"{arm}_accuracy_mean"] = 100 * statistics.fmean(row[arm]["test_accuracy"] for row in rows)
        figures[f"{arm}_tflops_mean"] = statistics.fmean(row[arm]["flops"] for row in rows) / 1e12
        figures[f"{arm}_seconds_mean"] = statistics.fmean(row[arm]["wall_seconds"] for row in rows)
    for key, arm in (("gain_points", "host"), ("equal_flops_points", "final")):
        if arm in rows[0]:
            gains = [100 * (row["grown"]["test_accuracy"] - row[arm]["test_accuracy"]) for row in rows]
            found = interval(gains)
            figures |= {f"{key}_mean": found.mean, f"{key}_ci_low": found.low, f"{key}_ci_high": found.high}
    figures["fossilized_mean"] = statistics.fmean(row["grown"]["fossilized"] for row in rows)
    figures["culled_mean"] = statistics.fmean(row["grown"]["culled"] for row in rows)
    figures["tables"] = {"resnet-lite/glyphs": [{arm: dict(row[arm]) for arm in row} for row in rows]}
    return figures


def identity(settings: Sequence[str]) -> str:
    """A folder's name for this code and these settings: a result is never taken for that of another study."""
    files = sorted(Path(esper_ray.__file__).parent.rglob("*.py"))
    content = b"".join(file.read_bytes() for file in files) + "\n".join(settings).encode()
    return digest(content)[:12]


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument(
        "--seeds", type=int, metavar="N", help="random seeds, paired over the arms (10; 5 with --quick)"
    )
    parser.add_argument("--home", type=Path, default=Path("build/growth"), metavar="DIR", help="where runs are kept")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of every run")
    parser.add_argument("--parallel", type=int, default=2, metavar="N", help="runs at a time, one thread each")
    parser.add_argument("--one", nargs=2, metavar=("SEED", "ARM"), help="do a single run and print its result")
    given = parser.parse_args()
    if given.one:
        print(json.dumps(work(given.home, int(given.one[0]), given.one[1], given.set)))
        return
    home = given.home / identity(given.set)
    common.run(
        "growth",
        BARS,
        lambda: study(home, given.seeds or (5 if given.quick else 10), given.set, ARMS, given.parallel),
        given.json,
    )


if __name__ == "__main__":
    main()
