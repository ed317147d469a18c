"""Does the school learn, and how fast: targets over random seeds, and steps a second beside other people's libraries.

    python -m benchmarks.simic --quick --json simic.json     2 seeds, at most 10 minutes
    python -m benchmarks.simic --json simic.json             10 seeds, about an hour on 2 cores

- ``..._steps_to_475_max``: environment steps until a greedy evaluation over 100 episodes of CartPole-v1, one every
  5,000 steps, has a mean of 475; of the slowest seed. A seed that does not get there makes it infinite (null in JSON).
- ``acrobot_return``, ``impala_acrobot_return``: mean of such an evaluation on Acrobot-v1: PPO after 100,000 steps,
  IMPALA after 150,000, of the worst seed. The bar is gymnasium's own reward threshold; stopping at the first good
  evaluation would flatter it.
- ``steps_per_s_1``, ``steps_per_s_2``: environment steps a second of PPO, acted and learned from, with 1 and 2 workers
  on a local Ray. Start-up and the first 2,500 steps come before the clock; tables give their seconds.
- ``..._ratio``: ours to the peer's in the same setting, median over repeats; ``rllib_ratio``: of the worst RLlib
  pairing in each repeat.
- ``replay_sample_us``: drawing 32 segments of 32 steps from a full replay of 64 MiB, copies included; median.

A peer that is not installed is left out.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import common
from benchmarks.common import Bar
from benchmarks.peers import pairings
from benchmarks.peers.pairings import PAIRINGS, Pairing, Row

BARS = (
    Bar("ppo_cartpole_steps_to_475_max", 100_000),
    Bar("impala_cartpole_steps_to_475_max", 500_000),
    Bar("acrobot_return", -100.0, above=True),
    Bar("impala_acrobot_return", -100.0, above=True),
    Bar("rllib_ratio", 3.0, above=True),
    Bar("single_process_ratio", 1.0, above=True),
    Bar("replay_sample_us", 50.0),
)
_SEED_SECONDS = 3600.0
_QUICK_PAIRINGS = ("rllib_ppo_1", "rllib_impala_1", "single_process", "sb3")


@dataclass(frozen=True, slots=True)
class Target:
    """What each seed is to reach, and in how many environment steps."""

    algo: Literal["ppo", "impala"]
    env: str
    steps: int
    evaluate_every: int
    stop_at: float | None = None


TARGETS = {
    "ppo_cartpole_steps_to_475": Target("ppo", "CartPole-v1", 100_000, 5_000, stop_at=475.0),
    "impala_cartpole_steps_to_475": Target("impala", "CartPole-v1", 500_000, 5_000, stop_at=475.0),
    "acrobot_return": Target("ppo", "Acrobot-v1", 100_000, 50_000),
    "impala_acrobot_return": Target("impala", "Acrobot-v1", 150_000, 50_000),
}


def one(target: Target, seed: int) -> dict[str, Any]:
    """One training, in this process with one thread."""
    import torch

    from esper_ray.config import SimicConfig
    from esper_ray.simic.environments import EnvChoice
    from esper_ray.simic.plan import TrainingPlan, settings_for
    from esper_ray.simic.training import train

    torch.set_num_threads(1)
    given = SimicConfig(evaluate_every=target.evaluate_every, evaluate_episodes=100)
    config = settings_for(given, target.algo, target.env)
    plan = TrainingPlan(EnvChoice(target.env), target.algo, target.steps, seed, config, stop_at=target.stop_at)
    result = train(plan)
    return {
        "seed": seed,
        "reached": result.state == "reached",
        "steps": result.steps,
        "evaluations": [[steps, mean] for steps, mean, _ in result.evaluations],
        "seconds": result.seconds,
    }


def over_seeds(seeds: Mapping[str, int], done: Callable[[], None]) -> dict[str, list[dict[str, Any]]]:
    """The given number of seeds of each target, as many at a time as there are cores."""

    def run(key: str, seed: int) -> dict[str, Any]:
        command = [sys.executable, "-m", "benchmarks.simic", "--one", key, str(seed)]
        found = pairings.answer(command, give_up=_SEED_SECONDS)
        done()
        return found

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        futures = {key: [pool.submit(run, key, seed) for seed in range(count)] for key, count in seeds.items()}
        try:
            return {key: [future.result() for future in each] for key, each in futures.items()}
        finally:
            # After a fault or Ctrl-C nothing new begins.
            pool.shutdown(wait=False, cancel_futures=True)


def learning_figures(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, float]:
    """The slowest seed's steps, and the worst seed's return."""
    figures: dict[str, float] = {}
    for key in ("ppo_cartpole_steps_to_475", "impala_cartpole_steps_to_475"):
        steps = [row["steps"] if row["reached"] else math.inf for row in found[key]]
        figures |= {f"{key}_max": max(steps), f"{key}_median": statistics.median(steps)}
    for key in ("acrobot_return", "impala_acrobot_return"):
        figures[key] = min(row["evaluations"][-1][1] for row in found[key])
    return figures


def speed_figures(found: Mapping[str, Sequence[Row]]) -> dict[str, float]:
    """Medians over the repeats; what was not measured is not in it."""
    figures: dict[str, float] = {}
    ratios: dict[str, list[float]] = {}
    for name, rows in found.items():
        figures[f"{name}_ours_steps_per_s"] = statistics.median(row.ours["steps_per_s"] for row in rows)
        theirs = [row.theirs["steps_per_s"] for row in rows if row.theirs is not None]
        if theirs:
            figures[f"{name}_steps_per_s"] = statistics.median(theirs)
            ratios[name] = [row.ratio for row in rows if row.ratio is not None]
            figures[f"{name}_ratio"] = statistics.median(ratios[name])
    for workers in (1, 2):
        figures[f"steps_per_s_{workers}"] = figures[f"rllib_ppo_{workers}_ours_steps_per_s"]
    rllib = [each for name, each in ratios.items() if name.startswith("rllib")]
    if rllib:
        figures["rllib_ratio"] = statistics.median(min(repeat) for repeat in zip(*rllib, strict=True))
    return figures


def replay_sample_us(*, samples: int = 2_000, count: int = 32, steps: int = 32) -> float:
    """Median microseconds of a draw of ``count`` segments of CartPole's shape."""
    from esper_ray.simic.replay import Provenance, Replay

    replay, random = Replay(max_bytes=64 * 2**20), np.random.default_rng(0)
    segment: dict[str, np.ndarray[Any, Any]] = {
        "obs/": np.zeros((steps + 1, 4), np.float32),
        "actions": np.zeros((steps, 1), np.int64),
        "values": np.zeros(steps + 1, np.float32),
        **{key: np.zeros(steps, np.float32) for key in ("log_probs", "rewards")},
        **{key: np.zeros(steps, np.bool_) for key in ("terminated", "truncated", "valid")},
    }
    replay.add(segment, Provenance("benchmark", 0))
    for _ in range(64 * 2**20 // replay.bytes):
        replay.add(segment, Provenance("benchmark", 0), priority=float(random.random()))
    spent = []
    for _ in range(samples):
        start = time.perf_counter()
        replay.sample(count)
        spent.append(time.perf_counter() - start)
    return 1e6 * statistics.median(spent)


def chosen(python: str, *, quick: bool) -> tuple[list[Pairing], list[str]]:
    """The pairings to measure, and the modules that are not installed: their peers are left out."""
    needed = sorted({pairing.needs for pairing in PAIRINGS if pairing.needs})
    missing = [name for name in needed if not pairings.installed(python, name)]
    if missing:
        names = " and ".join(missing)
        text = f"not installed for {python}, so left out: {names}. To have them:\n  {pairings.INSTALL}"
        common.console.print(text, markup=False, soft_wrap=True)
    picked = []
    for pairing in PAIRINGS:
        if pairing.needs in missing or (quick and pairing.name not in _QUICK_PAIRINGS):
            # Ours still counts where one of our own figures comes from it.
            picked += [pairing.alone] if pairing.name.startswith("rllib_ppo") else []
        else:
            picked.append(pairing)
    return [pairing.lasting(6.0 if quick else 20.0) for pairing in picked], missing


def measure(python: str, *, quick: bool, seeds: int, repeats: int) -> dict[str, Any]:
    picked, missing = chosen(python, quick=quick)
    counts = dict.fromkeys(TARGETS, seeds)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=common.console) as progress:
        speed = progress.add_task(f"{len(picked)} pairings x {repeats} repeats", total=len(picked) * repeats)
        learning = progress.add_task(f"{len(counts)} targets x {seeds} seeds", total=sum(counts.values()))
        sample = replay_sample_us()
        rows = pairings.compare(picked, python, repeats=repeats, done=lambda: progress.advance(speed))
        trained = over_seeds(counts, lambda: progress.advance(learning))
    return {
        "seeds": seeds,
        "repeats": repeats,
        **learning_figures(trained),
        **speed_figures(rows),
        "replay_sample_us": sample,
        "tables": {
            "seeds": trained,
            "throughput": {
                name: [{"ours": row.ours, "theirs": row.theirs} for row in each] for name, each in rows.items()
            },
            "settings": {pairing.name: pairing.setting.arguments() for pairing in picked},
            "not_installed": missing,
        },
    }


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--seeds", type=int, metavar="N", help="random seeds of each target (10; 2 with --quick)")
    parser.add_argument("--repeats", type=int, metavar="N", help="repeats of each pairing (5; 2 with --quick)")
    parser.add_argument("--peers-python", default=pairings.peers_python(), metavar="PATH", help="who has the peers")
    parser.add_argument("--one", nargs=2, metavar=("TARGET", "SEED"), help="do a single training and print its result")
    given = parser.parse_args()
    if given.one:
        print(json.dumps(one(TARGETS[given.one[0]], int(given.one[1]))))
        return
    seeds, repeats = given.seeds or (2 if given.quick else 10), given.repeats or (2 if given.quick else 5)
    if given.quick:
        common.console.print(f"quick form: {seeds} seeds instead of 10, {repeats} repeats instead of 5")
    common.run(
        "simic",
        BARS,
        lambda: measure(given.peers_python, quick=given.quick, seeds=seeds, repeats=repeats),
        given.json,
    )


if __name__ == "__main__":
    main()
