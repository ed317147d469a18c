"""Our side of a pairing: environment steps a second, acting and learning together, with workers on a local Ray.

    python -m benchmarks.simic_throughput ppo --workers 1 --envs 16 --rollout 64

With ``--workers 0`` one process acts and learns in turns, without Ray. Takes the same setting and prints the same line
as the scripts in benchmarks/peers.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from typing import cast

import gymnasium
import torch

import esper_ray
from benchmarks.peers.setting import Clock, Setting, parse
from esper_ray import config as configuration
from esper_ray.config import SimicConfig
from esper_ray.runtime import connect
from esper_ray.simic.environments import EnvChoice
from esper_ray.simic.plan import ALGOS, Algo, TrainingPlan
from esper_ray.simic.training import Crew, Progress, train

_ENDLESS = 10**9


def plan_of(algo: Algo, setting: Setting) -> TrainingPlan:
    """The setting as a training that goes on until it is stopped; nothing skips part of the work."""
    config = SimicConfig(
        workers=setting.workers,
        envs=setting.envs,
        rollout_steps=setting.rollout,
        hidden=tuple(setting.widths),
        minibatches=setting.minibatches,
        epochs=setting.epochs,
        learning_rate=setting.learning_rate,
        entropy_weight=0.01,
        target_kl=0.0,
        evaluate_every=0,
    )
    return TrainingPlan(EnvChoice(setting.env), algo, _ENDLESS, seed=setting.seed, config=config)


@contextlib.contextmanager
def crew(plan: TrainingPlan) -> Iterator[Crew | None]:
    """The workers, on a Ray cluster that ends with them; None without workers."""
    if not plan.config.workers:
        yield None
        return
    folder = tempfile.mkdtemp(prefix="er", dir="/tmp")
    os.environ["RAY_TMPDIR"] = folder
    os.environ.pop("RAY_ADDRESS", None)
    config = configuration.load(None, [f"home={folder}/home", "ray.dashboard=false", "nissa.port=0"])
    try:
        with connect(config):
            from esper_ray.actors.simic import RayCrew

            with RayCrew(plan) as made:
                yield made
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in ALGOS:
        raise SystemExit(f"usage: python -m benchmarks.simic_throughput {{{','.join(ALGOS)}}} [options]")
    algo, setting = cast(Algo, sys.argv.pop(1)), parse(__doc__)
    torch.set_num_threads(1)
    plan, clock = plan_of(algo, setting), Clock(setting)
    going = True

    def look(progress: Progress) -> None:
        nonlocal going
        going = clock.running(progress.steps)

    with crew(plan) as workers:
        result = train(plan, workers, should_stop=lambda: not going, on_progress=look)
    last = result.curve[-1]
    clock.report(f"{esper_ray.__version__}, gymnasium {gymnasium.__version__}", dropped_steps=last.dropped_steps)


if __name__ == "__main__":
    main()
