"""RLlib's PPO on its new API stack: synchronous sampling by remote runners, a learner in this process.

python -m benchmarks.peers.rllib_ppo --workers 1 --envs 16 --rollout 64
"""

from __future__ import annotations

from ray.rllib.algorithms.ppo import PPOConfig

from benchmarks.peers import rllib
from benchmarks.peers.setting import parse


def main() -> None:
    setting = parse(__doc__)
    config = rllib.common(PPOConfig(), setting).training(
        minibatch_size=setting.minibatch,
        num_epochs=setting.epochs,
        lambda_=0.95,
        clip_param=0.2,
        use_kl_loss=False,
        vf_loss_coeff=0.5,
        entropy_coeff=0.01,
        grad_clip=0.5,
    )
    # Every step that is sampled is learned before the next one is; its "trained" counts each epoch again.
    rllib.measure(config, setting, counter=("env_runners", "num_env_steps_sampled_lifetime"))


if __name__ == "__main__":
    main()
