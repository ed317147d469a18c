"""Growing in the user's own training loop: `attach` a model, and two lines in the loop do the rest.

    grower = esper_ray.attach(model, "auto", sample=inputs, loss=loss, optimizer=optimizer, epochs=20)
    for epoch in range(20):
        for inputs, targets in batches:
            found = loss(model(inputs), targets)
            found.backward()
            grower.step(inputs, targets, found)     # the first line: between backward() and step()
            optimizer.step()
            optimizer.zero_grad()
        print(grower.epoch(validation))             # the second one: held-out batches

`esper run --task` is the other way: there Tolaria trains, with checkpoints, rollback and reports.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

from torch import Tensor, nn
from torch.optim import Optimizer

from esper_ray import config as configuration
from esper_ray.attaching.grower import Grower
from esper_ray.attaching.report import EpochReport
from esper_ray.attaching.sockets import refuse_compiled
from esper_ray.config import Config
from esper_ray.contracts.budgets import HOST_PARAMETER_LIMIT
from esper_ray.errors import HostError
from esper_ray.tasks.objective import from_loss
from esper_ray.tasks.propose import Proposal, as_table, propose
from esper_ray.tasks.slots import Slots, check_host, check_names

if TYPE_CHECKING:
    from esper_ray.runtime import Session

__all__ = ["EpochReport", "Grower", "Proposal", "as_table", "attach", "propose"]


def attach(
    model: nn.Module,
    slots: Slots | Literal["auto"] = "auto",
    *,
    loss: Callable[[Tensor, Tensor], Tensor],
    optimizer: Optimizer,
    epochs: int,
    sample: Tensor | None = None,
    score: Callable[[Tensor, Tensor], Tensor] | None = None,
    config: Config | Sequence[str] = (),
    accumulate: int = 1,
    host_limit: int = HOST_PARAMETER_LIMIT,
    system: Session | None = None,
) -> Grower:
    """Make a model able to grow in the loop that trains it. Its code and its weights are not changed.

    Args:
        model: takes one tensor [N, ...]. Attach it before it is wrapped by torch.compile.
        slots: names of modules, as ``model.named_modules()`` has them; or names with the kind of slot each is, "conv",
            "sequence" or "vector"; or "auto": places are proposed (`propose`), and the grower's ``proposals`` say why.
        loss: (outputs, targets) -> scalar, a mean over the batch: what the loop trains on.
        optimizer: the loop's own; a seed's parameters join its first group when it becomes a part of the model.
        epochs: how many the loop will have; when and where it pays to grow depends on it.
        sample: inputs [N, ...] from which shapes are found; else those of the first batch are taken.
        score: (outputs, targets) -> [N], 1 at best; left out, the accuracy where targets are classes.
        config: a configuration, or settings such as ``["tamiyo.grow_by=0.2"]``.
        accumulate: over how many batches gradients are summed before a step, each loss being divided by it.
        host_limit: a host with more parameters is refused.
        system: a running system, whose Tamiyo decides and whose forge makes the blocks; else this process does both.

    Raises:
        HostError: the model, a name or a shape does not do; the text says what to do instead.
        ConfigError: a setting is wrong.
    """
    settings = config if isinstance(config, Config) else configuration.load(settings=config)
    check_host(model, host_limit)
    refuse_compiled(model)
    if isinstance(slots, str) and slots != "auto":
        raise HostError(f"{slots!r} names no slots.", remedy='Give a list of names, or "auto".')
    if slots != "auto":
        check_names(model, slots)
    grower = Grower(
        model, slots, from_loss(loss, score), optimizer, settings, epochs=epochs, accumulate=accumulate, system=system
    )
    if sample is not None:
        try:
            grower.prepare(sample)
        except BaseException:
            grower.close()
            raise
    return grower
