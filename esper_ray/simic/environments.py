"""Opens environments by their gymnasium id, as vectors, and says in one sentence why it cannot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import gymnasium
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv

from esper_ray.errors import EnvironmentRefused
from esper_ray.simic.spaces import Interface, interface_of
from esper_ray.simic.tapes import Tape, VectorTape


@dataclass(frozen=True, slots=True)
class EnvChoice:
    """An environment's id and the options that `gymnasium.make` gets."""

    id: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def make(self) -> gymnasium.Env[Any, Any]:
        """One environment.

        Raises:
            EnvironmentRefused: gymnasium does not know the id, or cannot make it with these options.
        """
        try:
            return gymnasium.make(self.id, disable_env_checker=True, **self.options)
        except (gymnasium.error.Error, ModuleNotFoundError) as error:
            raise EnvironmentRefused(
                f"There is no environment {self.id!r}.",
                why=" ".join(str(error).split()).rstrip("?.") + ".",
                remedy="`gymnasium.pprint_registry()` prints the known ones; another package's is named package:Id-v0.",
            ) from None
        except TypeError as error:
            raise EnvironmentRefused(
                f"{self.id} cannot be made with the options {dict(self.options)}.", why=f"{error}."
            ) from None

    def interface(self) -> Interface:
        """Its spaces, as Simic sees them.

        Raises:
            EnvironmentRefused: as `make`, or its spaces are not supported.
        """
        env = self.make()
        try:
            _, info = env.reset(seed=0)
            return interface_of(self.id, env.observation_space, env.action_space, info)
        finally:
            env.close()

    def vector(self, envs: int, *, taped: bool = False) -> VectorEnv[Any, Any, Any]:
        """That many of them, stepped together: by the environment's own vector where it has one.

        Args:
            taped: keep what they are given, so that `tapes` can bring others to where they stand.

        Raises:
            EnvironmentRefused: as `make`.
        """
        self.make().close()
        if gymnasium.spec(self.id).vector_entry_point is not None:
            own = gymnasium.make_vec(self.id, num_envs=envs, vectorization_mode="vector_entry_point", **self.options)
            return VectorTape(own) if taped else own
        made = (lambda: Tape(self.make())) if taped else self.make
        return SyncVectorEnv([made] * envs, copy=False, autoreset_mode=AutoresetMode.NEXT_STEP)
