"""`esper_ray/Morphogenesis-v0`: an episode is one short training run, an action one micro-step of a decision.

An operation other than NO_OP is queued: the next observation shows it as pending, its slot closed, and nothing was
trained. NO_OP, or the fourth command, closes the boundary: the commands are carried out, one epoch trains, and the
reward of `reward.py` comes. After the last epoch the episode is terminated; it is never truncated.

With ``against_host`` the last reward is less what the same task is worth when nothing is ever grown: no action changes
that number, so it changes no policy's rank, and it takes away most of what makes returns differ between tasks.

The observation holds the masks of what is legal. A head that does not apply (the slot of NO_OP, the blueprint of CULL)
may have any value. What to do with an illegal action is the option ``illegal``: "error" raises, "no_op" counts it as
NO_OP and says so in ``info["illegal"]``. The registered environment has "no_op", for checkers that draw blindly.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeVar

import gymnasium
import numpy as np
import numpy.typing as npt
from gymnasium import spaces
from gymnasium.error import InvalidAction, ResetNeeded

from esper_ray.config import build
from esper_ray.contracts.budgets import MAX_COMMANDS_PER_BOUNDARY
from esper_ray.contracts.ports import SlotSignature
from esper_ray.errors import EnvironmentRefused
from esper_ray.karn.catalog import CATALOG
from esper_ray.reliability.ids import derive_seed
from esper_ray.simic import reward
from esper_ray.simic.episode import Episode
from esper_ray.simic.registration import MORPHOGENESIS
from esper_ray.simic.reward import RewardConfig
from esper_ray.simic.tasks import SPLITS, ShortTask, SplitName, sample_task
from esper_ray.tamiyo import actions, graph
from esper_ray.tamiyo.actions import GERMINATE, NO_OP, OPERATIONS, SCHEDULES, Choice, Masks
from esper_ray.tamiyo.graph import Layout, Observation
from esper_ray.tamiyo.policy import GraphPolicy
from esper_ray.tamiyo.view import Proposal

T = TypeVar("T")

LAYOUT = Layout(
    layers=10, slots=3, blueprints=len(CATALOG.query(SlotSignature("conv", (16, 12, 12))).candidates), edges=9
)
"""The host of every episode is a `resnet-lite`, so there is room for exactly that."""


class Morphogenesis(gymnasium.Env[Any, npt.NDArray[np.int64]]):
    """Grow a model while it trains.

    Args:
        split: which part of the tasks is drawn from: "train" or "held_out".
        task: play this one only.
        rewards: the rents, as a `RewardConfig` or its fields.
        tasks: draw from so many tasks only, always the same ones; 0 draws a new one each time.
        against_host: the return is the gain over the host alone. The host's run is made once for each task.
        folder: where data sets are kept; the configured home's by default.
        illegal: what an illegal action does, "error" or "no_op".

    Raises:
        EnvironmentRefused: an option has a value that it cannot have.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012  gymnasium's own name and form

    def __init__(
        self,
        *,
        split: SplitName = "train",
        task: ShortTask | Mapping[str, Any] | None = None,
        rewards: RewardConfig | Mapping[str, Any] | None = None,
        tasks: int = 0,
        against_host: bool = False,
        folder: Path | str | None = None,
        illegal: Literal["error", "no_op"] = "error",
        render_mode: str | None = None,
    ) -> None:
        self.render_mode = render_mode
        self._split, self._illegal = _one_of("split", split, SPLITS), _one_of("illegal", illegal, ("error", "no_op"))
        self._task = None if task is None else _made(ShortTask, task)
        self._rewards = _made(RewardConfig, rewards or {})
        self._folder = Path(folder) if folder is not None else build({}).home / "data"
        if tasks < 0:
            raise EnvironmentRefused(f"{MORPHOGENESIS} cannot draw from {tasks} tasks.", remedy="0 is all of them.")
        self._tasks, self._against_host = tasks, against_host
        self._episode: Episode | None = None
        self._pending: list[Proposal] = []
        self._observation: Observation = {}
        self.observation_space = spaces.Dict(
            {
                name: spaces.Box(least, most, shape, dtype=kind)
                for name, (shape, kind, least, most) in graph.shapes(LAYOUT).items()
            }
        )
        self.action_space = spaces.MultiDiscrete(
            [len(OPERATIONS), LAYOUT.slots, LAYOUT.blueprints, len(SCHEDULES)], dtype=np.int64
        )

    def make_policy(self) -> GraphPolicy:
        """A new policy that understands this environment."""
        return GraphPolicy()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Draw a task and train its first epoch.

        Args:
            options: ``task``, a `ShortTask` or its fields, to play that one now.

        Raises:
            EnvironmentRefused: such a task there is not.
        """
        super().reset(seed=seed)
        number = int(self.np_random.integers(self._tasks or 2**31))
        wanted = (options or {}).get("task", self._task)
        drawn = pool_task(number, self._split)
        task = drawn if wanted is None else _made(ShortTask, wanted)
        self._episode = Episode(task, folder=self._folder, rewards=self._rewards)
        self._episode.open()
        self._pending = []
        return self._look(), self._info(task=self._episode.task.describe())

    def step(self, action: npt.NDArray[np.int64]) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """One micro-step.

        Raises:
            InvalidAction: the action is illegal, and ``illegal`` is "error".
            ResetNeeded: there is no episode, or it is over.
        """
        episode = self._episode
        if episode is None or episode.over:
            raise ResetNeeded("There is no episode under way. Call reset() first.")
        choice = _applying(action)
        legal = self._masks().allows(choice)
        if not legal:
            if self._illegal == "error":
                raise InvalidAction(
                    f"The action {choice.indices} is not legal at epoch {episode.view.now.epoch}. "
                    "The masks say what is: mask_operation, mask_slot and mask_blueprint of the observation."
                )
            choice = Choice()
        proposal = actions.to_proposal(choice, episode.view, "")
        if proposal is not None:
            self._pending.append(proposal)
        if proposal is not None and len(self._pending) < MAX_COMMANDS_PER_BOUNDARY:
            potential = episode.potential()
            given = reward.shaping(potential, potential, self._rewards)
            return self._look(), given, False, False, self._info(illegal=not legal)
        given = episode.advance(self._pending)
        self._pending = []
        info = self._info(illegal=not legal)
        if episode.over:
            info["result"] = episode.result().describe()
            if self._against_host:
                given -= worth_alone(episode.task, self._folder, self._rewards)
        return self._look(), given, episode.over, False, info

    def _look(self) -> Observation:
        assert self._episode is not None
        self._observation = graph.observe(self._episode.view, self._pending, LAYOUT)
        # The caller may keep or change what he gets; the structure in it belongs to the view.
        return {name: array.copy() for name, array in self._observation.items()}

    def _masks(self) -> Masks:
        seen = self._observation
        return Masks(seen["mask_operation"], seen["mask_slot"], seen["mask_blueprint"])

    def _info(self, **more: Any) -> dict[str, Any]:
        assert self._episode is not None
        legal = self._masks()
        masks = {name: getattr(legal, name).copy() for name in Masks.__slots__}
        return {"epoch": self._episode.view.now.epoch, "masks": masks, "illegal": False, **more}


def pool_task(number: int, split: SplitName = "train") -> ShortTask:
    """The task that an episode has whose environment drew ``number``."""
    return sample_task(derive_seed("environment", number), split=split)


@lru_cache(maxsize=4096)
def worth_alone(task: ShortTask, folder: Path, rewards: RewardConfig) -> float:
    """What a task is worth when nothing is grown."""
    episode = Episode(task, folder=folder, rewards=rewards)
    episode.open()
    while not episode.over:
        episode.advance([])
    return episode.result().reward


def _one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> Any:
    if value not in allowed:
        raise EnvironmentRefused(
            f"{MORPHOGENESIS} has no {name} {value!r}.", remedy=f"Use {' or '.join(map(str, allowed))}."
        )
    return value


def _made(kind: type[T], value: T | Mapping[str, Any]) -> T:
    """What was given, or made from the fields that were given."""
    if isinstance(value, kind):
        return value
    try:
        return kind(**value)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        fields = ", ".join(getattr(kind, "__slots__", ()))
        raise EnvironmentRefused(
            f"{MORPHOGENESIS} cannot make a {kind.__name__} of {value}.",
            why=f"{error}.",
            remedy=f"Its fields: {fields}.",
        ) from None


def _applying(action: npt.NDArray[np.int64]) -> Choice:
    """The choice of an action, with 0 for the heads that do not apply."""
    operation, slot, blueprint, schedule = (int(each) for each in action)
    if operation == GERMINATE:
        return Choice(operation, slot, blueprint, schedule)
    return Choice() if operation == NO_OP else Choice(operation, slot)
