"""A PPO in one process and one file, of the kind that CleanRL made the yardstick: nothing is shared, sent or hidden.

    python -m benchmarks.peers.single_process_ppo --envs 4 --rollout 128

Schulman et al. 2017, with what Huang et al. 2022 ("The 37 implementation details of PPO") found to matter: orthogonal
weights, Adam with epsilon 1e-5, advantages normalised in each minibatch, a clipped value loss, a falling learning rate.
"""

from __future__ import annotations

import itertools

import gymnasium
import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Categorical

from benchmarks.peers.setting import Clock, Setting, parse

GAMMA, LAMBDA, CLIP, ENTROPY, VALUE, GRADIENT_NORM = 0.99, 0.95, 0.2, 0.01, 0.5, 0.5


def mlp(widths: list[int], outputs: int, gain: float) -> nn.Sequential:
    """Tanh layers with orthogonal weights; ``gain`` is the last layer's."""
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [_orthogonal(nn.Linear(before, after), 2**0.5), nn.Tanh()]
    return nn.Sequential(*layers, _orthogonal(nn.Linear(widths[-1], outputs), gain))


def _orthogonal(layer: nn.Linear, gain: float) -> nn.Linear:
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


class Agent(nn.Module):
    """Actor and critic with a trunk each."""

    def __init__(self, observation: int, actions: int, hidden: list[int]) -> None:
        super().__init__()
        self.actor = mlp([observation, *hidden], actions, 0.01)
        self.critic = mlp([observation, *hidden], 1, 1.0)

    def value(self, observations: Tensor) -> Tensor:
        return self.critic(observations).squeeze(-1)

    def distribution(self, observations: Tensor) -> Categorical:
        return Categorical(logits=self.actor(observations))


class Storage:
    """A rollout of ``T`` steps in ``B`` environments."""

    def __init__(self, length: int, envs: int, observation: int) -> None:
        self.observations = torch.zeros(length, envs, observation)
        self.actions = torch.zeros(length, envs, dtype=torch.long)
        self.log_probs, self.rewards, self.dones, self.values = torch.zeros(4, length, envs).unbind()


def advantages(stored: Storage, value: Tensor, done: Tensor) -> Tensor:
    """Generalised advantage estimates ``[T, B]``; ``dones[t]`` says that step ``t`` opens an episode."""
    found = torch.zeros_like(stored.rewards)
    carried = torch.zeros_like(value)
    for t in reversed(range(len(found))):
        alive = 1.0 - done
        delta = stored.rewards[t] + GAMMA * value * alive - stored.values[t]
        carried = delta + GAMMA * LAMBDA * alive * carried
        found[t] = carried
        value, done = stored.values[t], stored.dones[t]
    return found


def update(agent: Agent, optimizer: torch.optim.Optimizer, stored: Storage, gains: Tensor, setting: Setting) -> None:
    """All epochs over one rollout."""
    observations, actions = stored.observations.flatten(0, 1), stored.actions.flatten()
    old_log_probs, old_values, gains = stored.log_probs.flatten(), stored.values.flatten(), gains.flatten()
    returns = gains + old_values
    order = np.arange(len(actions))
    for _ in range(setting.epochs):
        np.random.shuffle(order)
        for start in range(0, len(order), setting.minibatch):
            rows = torch.from_numpy(order[start : start + setting.minibatch])
            distribution = agent.distribution(observations[rows])
            ratio = (distribution.log_prob(actions[rows]) - old_log_probs[rows]).exp()
            gain = gains[rows]
            gain = (gain - gain.mean()) / (gain.std() + 1e-8)
            policy_loss = torch.max(-gain * ratio, -gain * ratio.clamp(1 - CLIP, 1 + CLIP)).mean()
            value = agent.value(observations[rows])
            near = old_values[rows] + (value - old_values[rows]).clamp(-CLIP, CLIP)
            errors = torch.max((value - returns[rows]).square(), (near - returns[rows]).square())
            loss = policy_loss - ENTROPY * distribution.entropy().mean() + VALUE * 0.5 * errors.mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(agent.parameters(), GRADIENT_NORM)
            optimizer.step()


def main() -> None:
    setting = parse(__doc__)
    torch.set_num_threads(1)
    torch.manual_seed(setting.seed)
    np.random.seed(setting.seed)
    count = setting.workers * setting.envs
    same_step = gymnasium.vector.AutoresetMode.SAME_STEP
    envs = gymnasium.vector.SyncVectorEnv([lambda: gymnasium.make(setting.env)] * count, autoreset_mode=same_step)
    width = int(np.prod(envs.single_observation_space.shape))
    agent = Agent(width, int(envs.single_action_space.n), setting.widths)
    optimizer = torch.optim.Adam(agent.parameters(), lr=setting.learning_rate, eps=1e-5)
    stored = Storage(setting.rollout, count, width)
    seen, _ = envs.reset(seed=setting.seed)
    observation, done = torch.from_numpy(seen), torch.zeros(count)
    clock, steps = Clock(setting), 0
    expected = setting.warm_up + setting.steps + setting.batch
    while clock.running(steps):
        optimizer.param_groups[0]["lr"] = setting.learning_rate * max(1.0 - steps / expected, 0.0)
        for t in range(setting.rollout):
            stored.observations[t], stored.dones[t] = observation, done
            with torch.no_grad():
                distribution = agent.distribution(observation)
                action = distribution.sample()
                stored.log_probs[t] = distribution.log_prob(action)
                stored.values[t] = agent.value(observation)
            stored.actions[t] = action
            seen, reward, terminated, truncated, _ = envs.step(action.numpy())
            stored.rewards[t] = torch.from_numpy(reward)
            observation = torch.from_numpy(seen)
            done = torch.from_numpy(terminated | truncated).float()
        steps += setting.batch
        with torch.no_grad():
            gains = advantages(stored, agent.value(observation), done)
        update(agent, optimizer, stored, gains, setting)
    clock.report(f"torch {torch.__version__}, gymnasium {gymnasium.__version__}")


if __name__ == "__main__":
    main()
