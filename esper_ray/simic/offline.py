"""Learns from what runs have recorded, without acting: imitation first, then one constrained step of improvement.

Decisions that were drawn with recorded probabilities carry the improvement, by V-trace (Espeholt et al. 2018) on those
probabilities; it stops where the new policy leaves the one it started from by more than a bound, for beyond it the data
say nothing. Decisions without exploration can only be imitated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from esper_ray.config import Config
from esper_ray.errors import RunError
from esper_ray.reliability.ids import derive_seed
from esper_ray.simic import registry, trajectories
from esper_ray.simic.impala import impala_loss
from esper_ray.simic.replay import Provenance, Replay
from esper_ray.simic.reward import RewardConfig
from esper_ray.simic.rollout import Rollout
from esper_ray.simic.segments import rollout_of
from esper_ray.simic.trajectories import Trajectory, side_by_side
from esper_ray.tamiyo import policy_store
from esper_ray.tamiyo.policy import GraphPolicy

KL_BOUND = 0.1
"""Mean divergence from the starting policy, in nats per decision, at which improving ends."""
_BATCH = 8
_RATE = 1e-3


@dataclass(frozen=True, slots=True)
class Learned:
    """What came out, and of what.

    Attributes:
        explored: trajectories whose decisions were drawn; only these improve.
        effective_sample_size: of those, under the policy that came out: (sum w)^2 / sum w^2.
        divergence: mean, in nats per decision, from the policy that improving started from.
    """

    policy_id: str
    trajectories: int
    steps: int
    explored: int
    effective_sample_size: float
    divergence: float
    imitation_loss: float
    left_out: Mapping[str, int]


def learn(
    config: Config,
    *,
    start_from: str = "",
    runs: Sequence[str] = (),
    passes: int = 30,
    seed: int = 0,
    on_pass: Callable[[], None] = lambda: None,
) -> Learned:
    """Make a new policy from the experience in the home folder, and keep it.

    Args:
        start_from: a policy to improve; without one a new policy imitates first.

    Raises:
        RunError: there is nothing to learn from.
        PolicyRefused: the policy to start from cannot be used.
    """
    rewards = RewardConfig()
    gathered = trajectories.gather(config.home, rewards, runs)
    known = gathered.trajectories
    if not known:
        reasons = ", ".join(f"{count} x {reason}" for reason, count in gathered.left_out.items())
        raise RunError(
            "There is nothing to learn from.",
            why=f"Left out: {reasons}." if reasons else "No run has sent its decisions yet.",
            remedy="Let runs finish while the system is up, best with --set tamiyo.exploration=0.3.",
        )
    parent = registry.find(config.home, start_from).policy_id if start_from else ""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "offline policy"))
        policy = policy_store.load(config.home, parent)[0] if parent else GraphPolicy()
    school = _Offline(policy, known, rewards, seed)
    imitation = math.nan
    for _ in range(passes if not parent else 0):
        imitation = school.imitate()
        on_pass()
    explored = [each for each in known if each.exploration > 0.0]
    divergence = school.improve(explored, passes, on_pass) if explored else 0.0
    summary = {
        "algo": "offline v-trace",
        "runs": [each.run for each in known],
        "explored": len(explored),
        "decisions": sum(map(len, known)),
        "passes": passes,
        "seed": seed,
        "divergence": divergence,
    }
    return Learned(
        policy_id=policy_store.save(config.home, policy, parent_id=parent, training=summary),
        trajectories=len(known),
        steps=sum(map(len, known)),
        explored=len(explored),
        effective_sample_size=school.effective_sample_size(explored),
        divergence=divergence,
        imitation_loss=imitation,
        left_out=gathered.left_out,
    )


class _Offline:
    """One policy, its optimiser, and the replay with the trajectories that it learns from."""

    def __init__(self, policy: GraphPolicy, known: Sequence[Trajectory], rewards: RewardConfig, seed: int) -> None:
        self._policy, self._gamma, self._seed = policy, rewards.gamma, seed
        self._room, self._steps = trajectories.room_for(known), max(map(len, known))
        self._all = known
        self._parameters = list(policy.parameters())
        self._optimizer = torch.optim.Adam(self._parameters, lr=_RATE, eps=1e-5)
        self._random = np.random.default_rng(derive_seed(seed, "offline order") % 2**63)

    def imitate(self) -> float:
        """One pass of maximum likelihood over all trajectories; the mean loss in nats per decision."""
        losses = []
        for batch in self._batches(self._all):
            result, _ = self._evaluate(batch)
            valid = _tensor(batch.valid)
            loss = -(result[valid]).mean()
            self._step(loss)
            losses.append(float(loss.detach()))
        return float(np.mean(losses))

    def improve(self, explored: Sequence[Trajectory], passes: int, on_pass: Callable[[], None]) -> float:
        """V-trace passes until the divergence from the starting policy reaches its bound; returns that divergence.

        The replay draws those trajectories more often whose field reports tell of a clear effect.
        """
        replay = Replay(max_bytes=2**30, seed=self._seed)
        with torch.no_grad():
            for each in explored:
                item = trajectories.item(each, self._steps, self._room)
                item["start"] = self._evaluate(side_by_side([item]))[0][:, 0].numpy()
                effect = float(np.nan_to_num(np.abs(each.gains)).sum())
                replay.add(item, Provenance(each.run, 0), priority=1.0 + effect)
        divergence = 0.0
        for _ in range(passes):
            for _ in range(max(1, len(explored) // _BATCH)):
                sample = replay.sample(min(_BATCH, len(replay)))
                columns = dict(sample.columns)
                start = torch.from_numpy(np.swapaxes(columns.pop("start"), 0, 1).copy())
                divergence = self._improve(rollout_of(columns), start, sample.weights)
                if divergence > KL_BOUND:
                    return divergence
            on_pass()
        return divergence

    def _improve(self, batch: Rollout, start: Tensor, weights: npt.NDArray[Any]) -> float:
        """One step; the divergence that it began with."""
        log_probs, (values, entropy) = self._evaluate(batch)
        valid = _tensor(batch.valid)
        moved = (log_probs.detach() - start)[valid]
        divergence = float((moved.exp() - 1.0 - moved).mean())
        if divergence > KL_BOUND:
            return divergence
        loss = impala_loss(
            log_probs,
            values,
            torch.cat([values[1:].detach(), torch.zeros_like(values[:1])]),
            entropy,
            behaviour_log_probs=_tensor(batch.log_probs),
            rewards=_tensor(batch.rewards),
            terminated=_tensor(batch.terminated),
            truncated=_tensor(batch.truncated),
            valid=valid,
            gamma=self._gamma,
            rho_bar=1.0,
            c_bar=1.0,
            lambda_=1.0,
            value_weight=0.5,
            entropy_weight=0.0,
            weights=torch.from_numpy(np.asarray(weights, np.float32)),
        )
        self._step(loss.total)
        return divergence

    def effective_sample_size(self, explored: Sequence[Trajectory]) -> float:
        """How many trajectories of the new policy the explored ones are worth."""
        ratios = []
        with torch.no_grad():
            for each in explored:
                batch = side_by_side([trajectories.item(each, self._steps, self._room)])
                log_probs, _ = self._evaluate(batch)
                valid = _tensor(batch.valid)
                ratios.append(float((log_probs - _tensor(batch.log_probs))[valid].sum()))
        if not ratios:
            return 0.0
        weights = np.exp(np.asarray(ratios) - max(ratios))
        return float(weights.sum() ** 2 / np.square(weights).sum())

    def _batches(self, known: Sequence[Trajectory]) -> Iterator[Rollout]:
        order = self._random.permutation(len(known))
        for places in np.array_split(order, max(1, len(known) // _BATCH)):
            yield side_by_side([trajectories.item(known[place], self._steps, self._room) for place in places])

    def _evaluate(self, batch: Rollout) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """log_probs, and (values, entropy), each [T, B]."""
        shape = batch.rewards.shape
        obs = {name: _tensor(array[:-1]).flatten(0, 1) for name, array in batch.obs.items()}
        found = self._policy.evaluate(obs, _tensor(batch.actions).flatten(0, 1))
        return found.log_probs.view(shape), (found.values.view(shape), found.entropy.view(shape))

    def _step(self, loss: Tensor) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimizer.step()


def _tensor(array: npt.NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))
