"""Stable-Baselines3's PPO, in one process with its DummyVecEnv.

python -m benchmarks.peers.sb3_ppo --envs 8 --rollout 128
"""

from __future__ import annotations

import gymnasium
import stable_baselines3
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env

from benchmarks.peers.setting import Clock, parse


class Watch(BaseCallback):
    """Looks at the clock where a rollout begins, which is where the update of the one before is done."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock
        self._on = True

    def _on_rollout_start(self) -> None:
        self._on = self._clock.running(self.num_timesteps)

    def _on_step(self) -> bool:
        return self._on


def main() -> None:
    setting = parse(__doc__)
    torch.set_num_threads(1)
    count = setting.workers * setting.envs
    model = PPO(
        "MlpPolicy",
        make_vec_env(setting.env, n_envs=count, seed=setting.seed),
        n_steps=setting.rollout,
        batch_size=setting.minibatch,
        n_epochs=setting.epochs,
        learning_rate=setting.learning_rate,
        gamma=0.99,
        gae_lambda=0.95,
        clip_range=0.2,
        ent_coef=0.01,
        vf_coef=0.5,
        max_grad_norm=0.5,
        policy_kwargs={"net_arch": setting.widths, "activation_fn": torch.nn.Tanh},
        seed=setting.seed,
        device="cpu",
    )
    clock = Clock(setting)
    # One rollout more than can be needed: the clock is looked at where a rollout begins, and ends the training there.
    model.learn(setting.warm_up + setting.steps + 3 * setting.batch, callback=Watch(clock))
    clock.report(f"{stable_baselines3.__version__}, gymnasium {gymnasium.__version__}")


if __name__ == "__main__":
    main()
