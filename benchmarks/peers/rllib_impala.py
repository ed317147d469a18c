"""RLlib's IMPALA on its new API stack: runners that act without waiting, a learner thread in this process.

python -m benchmarks.peers.rllib_impala --workers 1 --envs 16 --rollout 32 --minibatches 1 --epochs 1
"""

from __future__ import annotations

from ray.rllib.algorithms.impala import IMPALAConfig

from benchmarks.peers import rllib
from benchmarks.peers.setting import parse


def main() -> None:
    setting = parse(__doc__)
    config = rllib.common(IMPALAConfig(), setting).training(
        train_batch_size_per_learner=setting.envs * setting.rollout,
        minibatch_size=setting.envs * setting.rollout // setting.minibatches,
        num_epochs=setting.epochs,
        vf_loss_coeff=0.5,
        entropy_coeff=0.01,
    )
    # Not what was sampled: fragments wait in a queue, and may be dropped there.
    rllib.measure(config, setting, counter=("learners", "__all_modules__", "num_env_steps_trained_lifetime"))


if __name__ == "__main__":
    main()
