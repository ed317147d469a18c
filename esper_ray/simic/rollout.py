"""Acts in a vector of environments and writes down what happened, as columns [T, B].

Both ways in which gymnasium's vectors begin a new episode are handled. With *next-step* reset the row after an end
holds the true final observation; the step from it is the reset, no transition, and not ``valid``. With *same-step*
reset that row is already the new episode's first; the final observation's value stands in ``final_values``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from torch import Tensor

from esper_ray.errors import EnvironmentRefused
from esper_ray.reliability.ids import derive_seed
from esper_ray.simic import tapes
from esper_ray.simic.policies import Policy, module_of
from esper_ray.simic.spaces import MASK, PLAIN, Interface

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]
Flags = npt.NDArray[np.bool_]
_SEEDS = 2**31 - 1
_OBS, _VECTOR = "obs/", "vector/"


@dataclass(frozen=True, slots=True)
class Weights:
    """A policy's tensors by name, and how many updates made them."""

    version: int
    arrays: Mapping[str, Array]

    @classmethod
    def of(cls, policy: Policy, version: int) -> Weights:
        state = module_of(policy).state_dict()
        return cls(version, {name: tensor.detach().cpu().numpy().copy() for name, tensor in state.items()})

    def put_into(self, policy: Policy) -> None:
        """Load them; they must fit."""
        # Arrays from Ray's store are read-only, which torch does not know.
        state = {name: torch.from_numpy(np.array(array)) for name, array in self.arrays.items()}
        module_of(policy).load_state_dict(state)


@dataclass(frozen=True, slots=True)
class Rollout:
    """T steps of B environments.

    Attributes:
        obs: each entry [T + 1, B, ...]; the last row was not acted on.
        actions: int64 [T, B, H].
        log_probs: float32 [T, B], under the policy that acted.
        values: float32 [T + 1, B], its V of each row of ``obs``.
        rewards: float32 [T, B].
        terminated, truncated: bool [T, B].
        valid: bool [T, B]; False for the reset steps between two episodes.
        final_values: float32 [T, B], V of the final observations of truncated episodes where ``obs`` does not hold
            them (same-step reset), else None.
        version: of the weights that acted.
        returns, lengths: of the episodes that ended, in their order.
    """

    worker: int
    version: int
    obs: dict[str, Array]
    actions: npt.NDArray[np.int64]
    log_probs: Floats
    values: Floats
    rewards: Floats
    terminated: Flags
    truncated: Flags
    valid: Flags
    final_values: Floats | None = None
    returns: tuple[float, ...] = ()
    lengths: tuple[int, ...] = ()

    @property
    def steps(self) -> int:
        """Transitions in it."""
        return int(self.valid.sum())

    def summary(self) -> RolloutSummary:
        return RolloutSummary(self.worker, self.version, self.steps, self.returns, self.lengths)


@dataclass(frozen=True, slots=True)
class RolloutSummary:
    """What the driver of a training needs to know of a rollout."""

    worker: int
    version: int
    steps: int
    returns: tuple[float, ...] = ()
    lengths: tuple[int, ...] = ()


def joined(rollouts: list[Rollout]) -> Rollout:
    """Rollouts of equal length side by side, as one of more environments."""
    first = rollouts[0]
    if len(rollouts) == 1:
        return first
    columns: dict[str, Any] = {
        name: np.concatenate([getattr(each, name) for each in rollouts], axis=1)
        for name in ("actions", "log_probs", "values", "rewards", "terminated", "truncated", "valid")
    }
    finals = [each.final_values for each in rollouts if each.final_values is not None]
    assert len(finals) in (0, len(rollouts))
    return replace(
        first,
        obs={key: np.concatenate([each.obs[key] for each in rollouts], axis=1) for key in first.obs},
        final_values=np.concatenate(finals, axis=1) if finals else None,
        returns=tuple(value for each in rollouts for value in each.returns),
        lengths=tuple(value for each in rollouts for value in each.lengths),
        **columns,
    )


class _Episodes:
    """Returns and lengths so far of the episodes that run."""

    def __init__(self, envs: int) -> None:
        self._sums, self._counts = np.zeros(envs), np.zeros(envs, np.int64)

    @property
    def so_far(self) -> tuple[Array, Array]:
        return self._sums, self._counts

    @so_far.setter
    def so_far(self, found: tuple[Array, Array]) -> None:
        self._sums, self._counts = found

    def count(self, rewards: Array, valid: Array, done: Array) -> tuple[tuple[float, ...], tuple[int, ...]]:
        """(returns, lengths) of those that ended in these steps [T, B], in their order."""
        sums = self._sums + np.cumsum(rewards * valid, axis=0, dtype=np.float64)
        counts = self._counts + np.cumsum(valid, axis=0)
        before_sums, before_counts = np.zeros_like(self._sums), np.zeros_like(self._counts)
        returns, lengths = [], []
        for step, env in np.argwhere(done).tolist():
            returns.append(float(sums[step, env] - before_sums[env]))
            lengths.append(int(counts[step, env] - before_counts[env]))
            before_sums[env], before_counts[env] = sums[step, env], counts[step, env]
        self._sums, self._counts = sums[-1] - before_sums, counts[-1] - before_counts
        return tuple(returns), tuple(lengths)


class RolloutWorker:
    """One vector of environments and the policy that acts in it.

    Args:
        vector: the environments; reset here with a seed named by ``seed`` and ``worker``.
        policy: acts with the weights it has, until others are given.
    """

    def __init__(
        self, vector: VectorEnv[Any, Any, Any], interface: Interface, policy: Policy, *, worker: int = 0, seed: int = 0
    ) -> None:
        mode = vector.metadata.get("autoreset_mode", AutoresetMode.NEXT_STEP)
        if mode is AutoresetMode.DISABLED:
            raise ValueError("the vector must reset its environments by itself")
        self._same_step = mode is AutoresetMode.SAME_STEP
        self._vector, self._interface, self._policy, self._worker = vector, interface, policy, worker
        self._envs = vector.num_envs
        self._generator = torch.Generator().manual_seed(derive_seed(seed, "acting", worker))
        first, info = vector.reset(seed=derive_seed(seed, "environments", worker) % _SEEDS)
        self._obs = {key: np.array(value) for key, value in interface.observed(first, info).items()}
        self._resetting = np.zeros(self._envs, np.bool_)
        self._episodes = _Episodes(self._envs)
        self._version = -1

    def set_weights(self, weights: Weights) -> None:
        """Act with these from now on."""
        if weights.version != self._version:
            weights.put_into(self._policy)
            self._version = weights.version

    def collect(self, steps: int) -> Rollout:
        """The next ``steps`` steps of each environment; episodes go on over the ends of rollouts.

        Raises:
            EnvironmentRefused: an environment gave an observation or a reward that is no number.
        """
        columns = self._columns(steps)
        tensors = {key: torch.from_numpy(array) for key, array in columns.obs.items()}
        finals = np.zeros((steps, self._envs), np.float32) if self._same_step else None
        with torch.inference_mode():
            for step in range(steps):
                for key, column in columns.obs.items():
                    column[step] = self._obs[key]
                acted = self._policy.act({key: each[step] for key, each in tensors.items()}, generator=self._generator)
                columns.actions[step] = choices = acted.actions.numpy()
                columns.log_probs[step] = acted.log_probs.numpy()
                columns.values[step] = acted.values.numpy()
                after, rewards, terminated, truncated, info = self._vector.step(self._interface.actions(choices))
                columns.rewards[step] = rewards
                columns.terminated[step] = terminated
                columns.truncated[step] = truncated
                if finals is not None and columns.truncated[step].any():
                    finals[step] = self._final_values(info, columns.truncated[step])
                self._obs = self._interface.observed(after, info)
            # Some vectors write their next observations into the same arrays.
            self._obs = {key: np.array(value) for key, value in self._obs.items()}
            for key, column in columns.obs.items():
                column[steps] = self._obs[key]
            columns.values[steps] = self._values({key: each[steps] for key, each in tensors.items()})
        self._check(columns)
        done = columns.terminated | columns.truncated
        if not self._same_step:
            columns.valid[0], columns.valid[1:] = ~self._resetting, ~done[:-1]
            self._resetting = done[-1]
        returns, lengths = self._episodes.count(columns.rewards, columns.valid, done)
        return replace(columns, final_values=finals, returns=returns, lengths=lengths)

    def state(self) -> dict[str, Array]:
        """Where it stands, as arrays: its environments, which must be taped, its episodes, and its draws.

        Raises:
            NotRepeatedError: the environments cannot be told as arrays.
        """
        sums, counts = self._episodes.so_far
        own = {"generator": self._generator.get_state().numpy(), "resetting": self._resetting}
        own |= {"sums": sums, "counts": counts, **{_OBS + key: array for key, array in self._obs.items()}}
        return own | {_VECTOR + key: array for key, array in tapes.state_of(self._vector).items()}

    def restore(self, state: Mapping[str, Array]) -> None:
        """Go on from where another worker of the same environments stood.

        Raises:
            NotRepeatedError: the environments did not come to the same place; this worker is of no more use.
        """
        seen, info = tapes.restore(self._vector, _under(state, _VECTOR))
        stood = _under(state, _OBS)
        for key, array in self._interface.observed(seen, info).items():
            if key not in stood or not np.array_equal(array, stood[key], equal_nan=array.dtype.kind == "f"):
                raise tapes.NotRepeatedError(f"after the same actions they showed another {key!r}")
        self._obs = {key: np.array(stood[key]) for key in self._obs}
        self._resetting = np.array(state["resetting"])
        self._episodes.so_far = state["sums"], state["counts"]
        self._generator.set_state(torch.from_numpy(np.array(state["generator"])))

    def close(self) -> None:
        self._vector.close()

    def _columns(self, steps: int) -> Rollout:
        shape = (steps, self._envs)
        return Rollout(
            worker=self._worker,
            version=self._version,
            obs={key: np.empty((steps + 1, *value.shape), value.dtype) for key, value in self._obs.items()},
            actions=np.empty((*shape, len(self._interface.heads)), np.int64),
            log_probs=np.empty(shape, np.float32),
            values=np.empty((steps + 1, self._envs), np.float32),
            rewards=np.empty(shape, np.float32),
            terminated=np.empty(shape, np.bool_),
            truncated=np.empty(shape, np.bool_),
            valid=np.ones(shape, np.bool_),
        )

    def _values(self, obs: dict[str, Tensor]) -> Floats:
        # Greedy, so that asking for values draws nothing from the generator.
        return self._policy.act(obs, generator=self._generator, greedy=True).values.numpy()

    def _final_values(self, info: Mapping[str, Any], truncated: Flags) -> Floats:
        """[B]: V of the final observations that the reset has replaced; 0 elsewhere."""
        found, places = np.zeros(self._envs, np.float32), np.flatnonzero(truncated)
        final = info["final_obs"]
        rows = final if isinstance(final, Mapping) else {PLAIN: final}
        if isinstance(final, np.ndarray) and isinstance(final[places[0]], Mapping):
            rows = {key: [row and row[key] for row in final] for key in final[places[0]]}
        obs = {
            key: torch.from_numpy(np.stack([np.asarray(rows[key][place]) for place in places]))
            if key in rows
            # A mask in the infos has no final row, and a value does not look at it.
            else torch.ones((len(places), *column.shape[1:]), dtype=torch.bool)
            for key, column in self._obs.items()
        }
        found[places] = self._values(obs)
        return found

    def _check(self, columns: Rollout) -> None:
        seen = {f"the observation {key!r}": value for key, value in columns.obs.items() if key != MASK}
        for name, array in {**seen, "the reward": columns.rewards}.items():
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                step = int(np.argwhere(~np.isfinite(array))[0][0])
                raise EnvironmentRefused(
                    f"{self._interface.env_id} gave a value of {name} that is no finite number.",
                    why=f"It came in step {step} of worker {self._worker}'s rollout.",
                    remedy="Mend the environment, or clip what it gives with a wrapper.",
                )


def _under(state: Mapping[str, Array], prefix: str) -> dict[str, Array]:
    return {key.removeprefix(prefix): array for key, array in state.items() if key.startswith(prefix)}
