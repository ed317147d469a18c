"""A running system as a loop in another process sees it: Tamiyo decides, the forge makes blocks, Urza serves them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from esper_ray.actors.clients import ByName, RayAnswer, RemoteDecider, RemoteKernels, until_done
from esper_ray.config import Config
from esper_ray.contracts.ports import Candidate, SlotInfo
from esper_ray.contracts.signing import load_keys
from esper_ray.karn.catalog import QueryAnswer, candidates

if TYPE_CHECKING:
    from esper_ray.tolaria.trainer import Surroundings

_KARN_SECONDS = 30.0


def offered(namespace: str, slot: SlotInfo) -> list[Candidate]:
    """What Karn offers for a slot."""
    karn = ByName("karn", namespace)
    answer = until_done(lambda: RayAnswer[QueryAnswer](karn, "query", str(slot.signature)).wait(_KARN_SECONDS))
    return candidates(slot, answer.candidates)


def surroundings(config: Config) -> Surroundings:
    """Everything that a loop in this process talks to; what is asked for in a slot, the forge begins to make."""
    from esper_ray.tolaria.trainer import Surroundings

    namespace = config.ray.namespace
    forge = ByName("tezzeret", namespace)

    def prepare(slot: SlotInfo) -> list[Candidate]:
        until_done(lambda: forge.call("start_forge", [str(slot.signature)]))
        return offered(namespace, slot)

    return Surroundings(
        decider=RemoteDecider(namespace),
        kernels=RemoteKernels(namespace),
        candidates=prepare,
        keys=load_keys(config.home / "keys" / "signing"),
        backends={"processes": f"its own, with the system in {namespace}"},
    )
