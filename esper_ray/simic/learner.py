"""Learns from rollouts: a policy, its optimiser, one of the two algorithms, and all that must survive a restart."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from esper_ray.errors import RunError
from esper_ray.reliability.ids import derive_seed
from esper_ray.simic import checkpoints
from esper_ray.simic.checkpoints import Counters
from esper_ray.simic.flat import Adam, FlatParameters
from esper_ray.simic.gae import gae
from esper_ray.simic.impala import impala_loss
from esper_ray.simic.plan import TrainingPlan
from esper_ray.simic.policies import module_of, policy_for
from esper_ray.simic.ppo import normalised, ppo_loss
from esper_ray.simic.replay import Sample
from esper_ray.simic.rollout import Rollout, Weights, joined
from esper_ray.simic.segments import rollout_of
from esper_ray.simic.spaces import Array, Interface

_KL_SLACK = 1.5


@dataclass(frozen=True, slots=True)
class Learned:
    """What one call of `Learner.learn` did.

    Attributes:
        version: of the weights that came out.
        metrics: means over the optimiser steps.
        priorities: new ones for the replayed segments, in the order of the sample.
    """

    version: int
    metrics: dict[str, float]
    priorities: tuple[float, ...] = ()


class Learner:
    """One policy in training.

    Args:
        interface: of the environment; what its checkpoints belong to.
    """

    def __init__(self, plan: TrainingPlan, interface: Interface) -> None:
        self._plan, self._config, self._interface = plan, plan.config, interface
        seed = derive_seed(plan.seed, "policy")
        self.policy = policy_for(plan.env, interface, hidden=plan.config.hidden, seed=seed)
        self._module = module_of(self.policy)
        self._flat = FlatParameters([each for each in self._module.parameters() if each.requires_grad])
        self._optimizer = Adam(self._flat, rate=plan.config.learning_rate)
        self._generator = torch.Generator().manual_seed(derive_seed(plan.seed, "learning"))
        self._version, self._steps = 0, 0
        if plan.initial is not None:
            checkpoints.load_policy(plan.initial, interface, self._module)

    @property
    def version(self) -> int:
        """How many updates made the present weights."""
        return self._version

    def weights(self) -> Weights:
        return Weights.of(self.policy, self._version)

    def learn(self, rollouts: Sequence[Rollout], replayed: Sample | None = None) -> Learned:
        """Improve the policy by one batch.

        Args:
            rollouts: of equal length; they are learned from side by side.
            replayed: segments of that length from earlier rollouts (IMPALA).

        Raises:
            RunError: a loss or a gradient is no finite number any more.
        """
        batch = joined(list(rollouts))
        share = min(1.0, self._steps / self._plan.steps) if self._config.anneal else 0.0
        self._optimizer.rate = max(1e-8, self._config.learning_rate * (1.0 - share))
        self._steps += batch.steps
        priorities: tuple[float, ...] = ()
        if self._plan.algo == "ppo":
            rows = list(self._ppo(batch))
        else:
            rows, priorities = self._impala(batch, replayed)
        self._version += 1
        names = list(dict.fromkeys(name for row in rows for name in row))
        means = {name: float(torch.stack([row[name] for row in rows if name in row]).mean()) for name in names}
        if not all(map(math.isfinite, means.values())):
            raise RunError(
                f"The training has diverged at update {self._version}.",
                why=f"Not finite: {', '.join(name for name, value in means.items() if not math.isfinite(value))}.",
                remedy="Lower simic.learning_rate or simic.clip_norm, and resume from the last checkpoint.",
            )
        metrics = {**means, "learning_rate": self._optimizer.rate, "optimizer_steps": float(len(rows))}
        return Learned(self._version, metrics, priorities)

    def _ppo(self, batch: Rollout) -> Iterator[dict[str, Tensor]]:
        """One row of metrics for each optimiser step."""
        config = self._config
        values, terminated, truncated = _tensor(batch.values), _tensor(batch.terminated), _tensor(batch.truncated)
        targets = gae(
            _tensor(batch.rewards) * config.reward_scale,
            values[:-1],
            _next_values(values[1:], truncated, batch.final_values),
            terminated,
            truncated,
            gamma=config.gamma,
            lambda_=config.gae_lambda,
        )
        valid = _tensor(batch.valid).flatten().nonzero().squeeze(1)
        columns = {f"obs/{key}": _tensor(array[:-1]).flatten(0, 1) for key, array in batch.obs.items()}
        columns |= {"actions": _tensor(batch.actions).flatten(0, 1), "log_probs": _tensor(batch.log_probs).flatten()}
        columns |= {"advantages": targets.advantages.flatten(), "returns": targets.returns.flatten()}
        for _ in range(config.epochs):
            order = valid[torch.randperm(len(valid), generator=self._generator)]
            parts = [column[order].tensor_split(config.minibatches) for column in columns.values()]
            for number, part in enumerate(zip(*parts, strict=True)):
                rows = dict(zip(columns, part, strict=True))
                if not len(rows["returns"]):
                    continue
                result = self.policy.evaluate(_observed(rows), rows["actions"])
                loss = ppo_loss(
                    result.log_probs,
                    result.values,
                    result.entropy,
                    behaviour_log_probs=rows["log_probs"],
                    advantages=normalised(rows["advantages"]),
                    returns=rows["returns"],
                    clip=config.clip,
                    value_weight=config.value_weight,
                    entropy_weight=config.entropy_weight,
                )
                if config.target_kl and float(loss.approx_kl) > _KL_SLACK * config.target_kl:
                    return
                extra = self._auxiliary(batch.obs, batch) if number == 0 else None
                row = self._step(loss.total, extra)
                yield row | {
                    "policy_loss": loss.policy,
                    "value_loss": loss.value,
                    "entropy": loss.entropy,
                    "approx_kl": loss.approx_kl,
                    "clip_fraction": loss.clip_fraction,
                }

    def _impala(self, fresh: Rollout, replayed: Sample | None) -> tuple[list[dict[str, Tensor]], tuple[float, ...]]:
        """Rows of metrics, and the new priorities of the replayed segments."""
        count = fresh.rewards.shape[1]
        batch = fresh if replayed is None else joined([fresh, rollout_of(replayed.columns)])
        weights = np.concatenate([np.ones(count), [] if replayed is None else replayed.weights]).astype(np.float32)
        errors = torch.zeros(len(weights))
        order = torch.randperm(len(weights), generator=self._generator)
        rows = []
        for places in order.tensor_split(min(self._config.minibatches, len(weights))):
            row, errors[places] = self._impala_step(batch, places.numpy(), torch.from_numpy(weights)[places])
            rows.append(row)
        return rows, tuple(errors[count:].tolist())

    def _impala_step(self, batch: Rollout, places: Array, weights: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        config = self._config
        shape = (len(batch.rewards), len(places))
        obs = {key: torch.from_numpy(array[:, places]) for key, array in batch.obs.items()}
        flat = {key: array[:-1].flatten(0, 1) for key, array in obs.items()}
        result = self.policy.evaluate(flat, torch.from_numpy(batch.actions[:, places]).flatten(0, 1))
        values = result.values.view(shape)
        with torch.no_grad():
            last = self.policy.act({k: a[-1] for k, a in obs.items()}, generator=self._generator, greedy=True).values
            following = torch.cat([values[1:], last[None]])
        truncated = torch.from_numpy(batch.truncated[:, places])
        finals = None if batch.final_values is None else batch.final_values[:, places]
        loss = impala_loss(
            result.log_probs.view(shape),
            values,
            _next_values(following, truncated, finals),
            result.entropy.view(shape),
            behaviour_log_probs=torch.from_numpy(batch.log_probs[:, places]),
            rewards=torch.from_numpy(batch.rewards[:, places]) * config.reward_scale,
            terminated=torch.from_numpy(batch.terminated[:, places]),
            truncated=truncated,
            valid=torch.from_numpy(batch.valid[:, places]),
            gamma=config.gamma,
            rho_bar=config.rho_bar,
            c_bar=config.c_bar,
            lambda_=config.vtrace_lambda,
            value_weight=config.value_weight,
            entropy_weight=config.entropy_weight,
            normalise=config.normalise,
            weights=weights,
        )
        row = self._step(loss.total, self._auxiliary(obs, batch, places))
        row |= {"policy_loss": loss.policy, "value_loss": loss.value, "entropy": loss.entropy}
        return row | {"approx_kl": loss.approx_kl}, loss.errors

    def _auxiliary(
        self, obs: dict[str, Array] | dict[str, Tensor], batch: Rollout, places: Array | slice = slice(None)
    ) -> Tensor | None:
        """The policy's own loss on a sequence; a reset step separates episodes just as an end does."""
        done = torch.from_numpy((batch.terminated | batch.truncated | ~batch.valid)[:, places])
        tensors = {key: _tensor(each) if isinstance(each, np.ndarray) else each for key, each in obs.items()}
        return self.policy.auxiliary_loss({key: each[:-1] for key, each in tensors.items()}, done)

    def _step(self, loss: Tensor, extra: Tensor | None) -> dict[str, Tensor]:
        self._flat.zero_grad()
        total = loss if extra is None else loss + self._config.auxiliary_weight * extra
        total.backward()  # type: ignore[no-untyped-call]
        row = {"gradient_norm": self._flat.clip(self._config.clip_norm)}
        self._optimizer.step()
        return row if extra is None else row | {"auxiliary_loss": extra.detach()}

    def adopt(self, weights: Weights, *, version: int, steps: int) -> None:
        """Go on from these weights, when later ones than the checkpoint's are known.

        Args:
            version: of the weights from now on.
            steps: learned so far.
        """
        weights.put_into(self.policy)
        self._version, self._steps = version, steps

    def save(self, folder: Path, counters: Counters) -> None:
        """Write everything to a training's folder."""
        checkpoints.save(
            folder,
            interface=self._interface,
            algo=self._plan.algo,
            module=self._module,
            optimizer=self._optimizer.state(),
            generator=self._generator,
            counters=counters,
            version=self._version,
            learned_steps=self._steps,
        )

    def load(self, folder: Path) -> Counters:
        """Go on from a training's folder.

        Raises:
            CheckpointError: there is none, or it is damaged, or of another environment or algorithm.
        """
        state = checkpoints.load(
            folder,
            interface=self._interface,
            algo=self._plan.algo,
            module=self._module,
            generator=self._generator,
        )
        self._optimizer.load(dict(state.optimizer))
        self._version, self._steps = state.version, state.learned_steps
        return state.counters


def _tensor(array: Array) -> Tensor:
    # Arrays from Ray's store are read-only, which torch warns of.
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _observed(rows: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("obs/"): column for name, column in rows.items() if name.startswith("obs/")}


def _next_values(following: Tensor, truncated: Tensor, finals: Array | None) -> Tensor:
    """V of the true next observation: that of the next row, but where a same-step reset has replaced it."""
    return following if finals is None else torch.where(truncated, _tensor(finals), following)
