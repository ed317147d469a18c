"""Which actors there are and what each takes: one table, from which start-up, checks and `cluster.yaml` follow.

The CPU shares sum to less than 2, so that the whole system fits a machine with two processors; the GPU shares are
asked for only where the cluster has a GPU. No ray in here: the table is data.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any

from esper_ray.config import Config
from esper_ray.errors import ConfigError, EnvironmentFault

HOME_RESOURCE = "esper_home"
"""Custom resource of the node that holds the home folder; asked for where the cluster has it (cluster.yaml)."""


@dataclass(frozen=True, slots=True)
class ActorSpec:
    """One actor.

    Args:
        shell: ``module:class`` of its Ray shell.
        num_cpus: logical processors; what Ray counts, not a limit.
        num_gpus: share of a GPU, on a cluster that has one.
        threads: processor threads for its numeric libraries; 0 leaves them to the configuration.
        concurrency: calls it answers at a time in its default group.
        groups: further concurrency groups, each with its own threads.
        custom: custom resources, asked for where the cluster has them.
        essential: a run cannot go on without it.
        niceness: of its process, see `take_priority`: whom the training waits for comes first, whoever works in the
            background last.
    """

    name: str
    shell: str
    num_cpus: float
    num_gpus: float = 0.0
    threads: int = 1
    concurrency: int = 1
    groups: Mapping[str, int] = field(default_factory=dict)
    custom: Mapping[str, float] = field(default_factory=lambda: {HOME_RESOURCE: 0.01})
    essential: bool = False
    niceness: int = 5

    def load(self) -> type:
        """The shell's class. Shells are light to import: the torch ones load it when they are constructed."""
        module, _, name = self.shell.partition(":")
        found: type = getattr(import_module(module), name)
        return found


SUPERVISOR = ActorSpec("supervisor", "esper_ray.actors.supervisor:SupervisorActor", 0.0, concurrency=8, essential=True)
ACTORS: tuple[ActorSpec, ...] = (
    ActorSpec(
        "tolaria",
        "esper_ray.actors.tolaria:TolariaActor",
        num_cpus=1.0,
        num_gpus=0.5,
        threads=0,
        groups={"control": 2},
        essential=True,
    ),
    ActorSpec("tamiyo", "esper_ray.actors.tamiyo:TamiyoActor", num_cpus=0.2, num_gpus=0.1, niceness=-5),
    ActorSpec("tezzeret", "esper_ray.actors.tezzeret:TezzeretActor", num_cpus=0.2, concurrency=4, niceness=15),
    ActorSpec("urza", "esper_ray.actors.urza:UrzaActor", num_cpus=0.1, concurrency=4),
    ActorSpec("karn", "esper_ray.actors.karn:KarnActor", num_cpus=0.1, concurrency=2),
    ActorSpec("oona", "esper_ray.actors.oona:OonaActor", num_cpus=0.1, concurrency=2),
    ActorSpec("simic", "esper_ray.actors.experience:SimicActor", num_cpus=0.1, concurrency=2, niceness=10),
    ActorSpec("nissa", "esper_ray.actors.nissa:NissaActor", num_cpus=0.1, concurrency=4, niceness=10),
)
EVERYONE = (SUPERVISOR, *ACTORS)
NAMES = tuple(spec.name for spec in EVERYONE)
_OVERRIDABLE = ("num_cpus", "num_gpus", "threads")
_NICENESS = {spec.name: spec.niceness for spec in EVERYONE} | {"school": 15}


def take_priority(who: str) -> int:
    """Give all threads of this process an actor's niceness, as far as that is allowed; returns what it has then.

    Ray starts its workers with niceness 15, behind everything else on the machine, its own dashboard included. A
    cluster that `cluster.start` makes starts them with 0, so that they may rank themselves. Without privileges a
    process can only become nicer: where ``ray start`` was called without ``RAY_worker_niceness=0`` most stay at 15.

    Args:
        who: an actor's name, or ``school`` for the workers, the learner and the replay of a training of Simic's.
    """
    threads = os.listdir("/proc/self/task") if sys.platform == "linux" else ["0"]
    for thread in threads:
        # Linux keeps the niceness of each thread apart, and Ray's threads are there before ours.
        with contextlib.suppress(PermissionError, ProcessLookupError):
            os.setpriority(os.PRIO_PROCESS, int(thread), _NICENESS[who])
    return os.getpriority(os.PRIO_PROCESS, 0)


def table(config: Config) -> dict[str, ActorSpec]:
    """The actors with the configuration's overrides applied.

    Raises:
        ConfigError: ``ray.resources`` names an unknown actor or resource, or a share below zero.
    """
    specs = {spec.name: spec for spec in EVERYONE}
    for name, changes in config.ray.resources.items():
        if name not in specs:
            raise ConfigError(
                f"ray.resources names the unknown actor {name!r}.", remedy=f"The actors are {', '.join(NAMES)}."
            )
        for key, value in changes.items():
            if key not in _OVERRIDABLE:
                raise ConfigError(
                    f"ray.resources.{name} has no key {key!r}.", remedy=f"It has {', '.join(_OVERRIDABLE)}."
                )
            if value < 0:
                raise ConfigError(f"ray.resources.{name}.{key} is {value}.", why="A share is never below zero.")
        values: dict[str, Any] = {key: int(value) if key == "threads" else value for key, value in changes.items()}
        specs[name] = replace(specs[name], **values)
    return specs


def options(spec: ActorSpec, config: Config, cluster: Mapping[str, float]) -> dict[str, Any]:
    """What ``ray.remote(Shell).options(...)`` gets; ``cluster`` is all that the cluster has, by resource."""
    threads = spec.threads or training_threads(config)
    # Ray gives each worker one thread by itself, and can then reuse a process that stands ready.
    environment = {} if threads == 1 else {"env_vars": {"OMP_NUM_THREADS": str(threads)}}
    return {
        "name": spec.name,
        "namespace": config.ray.namespace,
        "lifetime": "detached",
        "get_if_exists": True,
        "max_restarts": -1,
        "max_task_retries": 0,
        "num_cpus": spec.num_cpus,
        "num_gpus": gpu_share(spec, config, cluster),
        "resources": {key: share for key, share in spec.custom.items() if cluster.get(key, 0.0) >= share},
        "max_concurrency": spec.concurrency,
        "runtime_env": environment,
    }


def training_threads(config: Config) -> int:
    """Threads of the training process: half of the processors unless configured.

    The other half is for everything else: a step on all processors is many times slower as soon as anything else runs,
    because each of its parallel loops waits for the thread that was put aside.
    """
    return config.run.threads or max(1, (os.cpu_count() or 1) // 2)


def gpu_share(spec: ActorSpec, config: Config, cluster: Mapping[str, float]) -> float:
    """0 without a GPU in the cluster, and where the configuration trains on the CPU."""
    if config.run.device == "cpu" or cluster.get("GPU", 0.0) == 0.0:
        return 0.0
    return spec.num_gpus


def check_capacity(
    specs: Mapping[str, ActorSpec],
    config: Config,
    *,
    cluster: Mapping[str, float],
    available: Mapping[str, float],
) -> None:
    """Refuse to wait for what is not there; ``specs`` are the actors still to be created.

    Raises:
        EnvironmentFault: needed against available, and what to do.
    """
    needed = {
        "CPU": sum(spec.num_cpus for spec in specs.values()),
        "GPU": sum(gpu_share(spec, config, cluster) for spec in specs.values()),
    }
    for resource, amount in needed.items():
        there = available.get(resource, 0.0)
        if amount > there + 1e-6:
            raise EnvironmentFault(
                f"The actors need {amount:g} {resource}, and {there:g} of the cluster's "
                f"{cluster.get(resource, 0.0):g} are free.",
                why=f"Not yet running: {', '.join(specs)}.",
                remedy="Stop other work on the cluster, start Ray with more (`ray start --num-cpus=2`), "
                "or ask for less: --set ray.resources.tolaria.num_cpus=0.5",
            )
