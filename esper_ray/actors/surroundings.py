"""A running system as a loop in another process sees it: Tamiyo decides, the forge makes blocks, Urza serves them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from esper_ray.actors.clients import ByName, RayAnswer, RemoteDecider, RemoteKernels, until_done
from esper_ray.config import Config
from esper_ray.contracts.messages import blueprint_number
from esper_ray.contracts.ports import Answer, Candidate, Kernel, KernelSource, KernelSpec, SlotInfo
from esper_ray.contracts.signing import load_keys
from esper_ray.karn.catalog import CATALOG, QueryAnswer, candidates
from esper_ray.karn.recipe import LAST_OF_OURS

if TYPE_CHECKING:
    from esper_ray.tolaria.trainer import Surroundings

_KARN_SECONDS = 30.0


def offered(config: Config, slot: SlotInfo) -> list[Candidate]:
    """What Karn offers for a slot in such a run, and the approved blocks of the user's own that fit it."""
    karn, seeds, signature = ByName("karn", config.ray.namespace), config.seeds, slot.signature
    approved = list(seeds.approved)
    answer = until_done(
        lambda: RayAnswer[QueryAnswer](karn, "offered", str(signature), approved, seeds.offer).wait(_KARN_SECONDS)
    )
    here = CATALOG.query(signature, approved=approved)
    own = [each for each in here.candidates if blueprint_number(each.id) > LAST_OF_OURS]
    return candidates(slot, [*answer.candidates, *own])


def forge_order(config: Config, slots: Sequence[SlotInfo]) -> list[str]:
    """What the forge is asked to make for such a run, in the words of `tezzeret.forge.wanted_of`."""
    signatures = [slot.signature for slot in slots]
    wanted = [str(signature) for signature in signatures]
    for signature in signatures:
        standard = CATALOG.query(signature).candidates
        answer = CATALOG.query(signature, approved=config.seeds.approved, offer=config.seeds.offer)
        more = [each for each in answer.candidates if each not in standard]
        wanted += [f"{each.id}@{signature}" for each in more if blueprint_number(each.id) <= LAST_OF_OURS]
    return wanted


class WithOwn:
    """Urza's kernels; those of the user's own blocks are built and checked in this process, which has their code."""

    def __init__(self, urza: KernelSource, here: KernelSource) -> None:
        self._urza, self._here = urza, here

    def fetch(self, spec: KernelSpec) -> Answer[Kernel]:
        own = blueprint_number(spec.blueprint) > LAST_OF_OURS
        return (self._here if own else self._urza).fetch(spec)


def kernels(config: Config) -> KernelSource:
    """Where a run gets its blocks from; registers those of ``seeds.modules``.

    Raises:
        BlueprintError: one of the modules cannot be imported.
    """
    urza = RemoteKernels(config.ray.namespace, load_keys(config.home / "keys" / "signing"))
    if not config.seeds.modules:
        return urza
    from esper_ray.inprocess import LocalKernels
    from esper_ray.karn import own

    own.load(config.seeds.modules, config.run.code_folder)
    return WithOwn(urza, LocalKernels())


def surroundings(config: Config) -> Surroundings:
    """Everything that a loop in this process talks to; what is asked for in a slot, the forge begins to make."""
    from esper_ray.tolaria.trainer import Surroundings

    namespace = config.ray.namespace
    forge = ByName("tezzeret", namespace)

    def prepare(slot: SlotInfo) -> list[Candidate]:
        until_done(lambda: forge.call("start_forge", forge_order(config, [slot])))
        return offered(config, slot)

    return Surroundings(
        decider=RemoteDecider(namespace),
        kernels=kernels(config),
        candidates=prepare,
        keys=load_keys(config.home / "keys" / "signing"),
        backends={"processes": f"its own, with the system in {namespace}"},
    )
