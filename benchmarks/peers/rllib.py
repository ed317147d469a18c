"""What both RLlib peers share: a Ray of their own on the loopback interface, the same network, and the clock.

Everything that costs time and teaches nothing is off: no dashboard, no evaluation, no least time for an iteration.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

# Read by Ray at its import: its sockets stay on 127.0.0.1.
os.environ |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0"}
os.environ.setdefault("RAY_AUTH_MODE", "disabled")

import gymnasium
import ray
import torch
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig

from benchmarks.peers.setting import Clock, Setting

_STORE_BYTES = 256 * 1024 * 1024


@contextmanager
def cluster(setting: Setting) -> Iterator[None]:
    """A Ray for this one measurement, gone afterwards."""
    folder = tempfile.mkdtemp(prefix="rl", dir="/tmp")
    try:
        ray.init(
            address="local",
            num_cpus=setting.workers + 1,
            num_gpus=0,
            include_dashboard=False,
            object_store_memory=_STORE_BYTES,
            log_to_driver=False,
            logging_level="error",
            _temp_dir=folder,
        )
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def common(config: AlgorithmConfig, setting: Setting) -> AlgorithmConfig:
    """The part of the configuration that both algorithms have: runners, network, batch, a local learner."""
    model = DefaultModelConfig(fcnet_hiddens=setting.widths, fcnet_activation="tanh", vf_share_layers=False)
    return (
        config.environment(setting.env)
        .env_runners(
            num_env_runners=setting.workers,
            num_envs_per_env_runner=setting.envs,
            rollout_fragment_length=setting.rollout,
        )
        .learners(num_learners=0, num_gpus_per_learner=0)
        .rl_module(model_config=model)
        .training(lr=setting.learning_rate, gamma=0.99, train_batch_size_per_learner=setting.batch)
        .reporting(
            min_time_s_per_iteration=0, min_sample_timesteps_per_iteration=0, min_train_timesteps_per_iteration=0
        )
        .debugging(seed=setting.seed, log_level="ERROR")
    )


def measure(config: AlgorithmConfig, setting: Setting, *, counter: Sequence[str]) -> None:
    """Train until the clock has seen enough, and print what it saw.

    ``counter``: where the result of an iteration keeps the environment steps that the learner has had.
    """
    torch.set_num_threads(1)
    with cluster(setting):
        algorithm = config.build_algo()
        clock, steps = Clock(setting), 0
        while clock.running(steps):
            found: Any = algorithm.train()
            for key in counter:
                found = found.get(key, {})
            # An iteration that learned nothing may leave the counter out.
            steps = int(found) if found else steps
        clock.report(f"ray {ray.__version__}, gymnasium {gymnasium.__version__}")
        algorithm.stop()
