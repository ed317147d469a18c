"""Karn's catalogue and Urza's store: how long a lookup and a fetch take, and how far estimates of latency are off.

- ``lookup_*``: one query for a slot that was asked for before, or one lookup by number, in turns, in this process.
- ``first_query_*``: a query for a slot that nobody asked for yet: all blueprints are sized up.
- ``lookup_actor_*``: the actor's own time for the same, without the hop; ``hop_*`` is what a caller waits.
- ``latency_off_*``: the estimate of a step over its measured processor time, or the inverse, whichever is larger.
- ``fetch_hot_*``, ``fetch_cold_*``: a kernel from the store in this process, from memory and from a disk that has
  forgotten it; ``fetch_actor_*``: from Urza's actor as Tolaria does it, hop and seal included; ``fetch_ray_*``:
  by a call through Ray.
- ``hit_rate``: of what short runs fetch after a first one, how much was in memory.
- ``recovery_10k_s``: opening a store of 10,000 entries after its writer was killed; ``verify_10k_s``: reading them all.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks import catalog_store, common
from benchmarks.common import Bar, percentile
from esper_ray import config as configuration
from esper_ray.actors.clients import ByName, RayAnswer
from esper_ray.contracts.enums import BlueprintTier
from esper_ray.contracts.ports import SlotSignature
from esper_ray.karn.blueprints import build
from esper_ray.karn.catalog import CATALOG, Catalog
from esper_ray.karn.librarian import Librarian
from esper_ray.karn.properties import SLOTS
from esper_ray.runtime import connect
from esper_ray.tezzeret import compiler

BARS = (
    Bar("lookup_p99_us", 50.0),
    Bar("lookup_actor_p99_ms", 1.0),
    Bar("fetch_hot_p99_ms", 0.1),
    Bar("fetch_actor_p50_ms", 2.0),
    Bar("fetch_actor_p99_ms", 5.0),
    Bar("fetch_cold_p99_ms", 20.0),
    Bar("hit_rate", 0.99, reach=True),
    Bar("hit_rate_fetches", 0, above=True),
    Bar("recovery_10k_s", 1.0),
)
BATCH = 64
_SHORT = (
    "run.epochs=8",
    "run.train_samples=640",
    "run.validation_samples=200",
    "run.test_samples=200",
    "run.host_width=8",
    "run.threads=1",
    "forge.compile=never",
    # Asks for a block at each boundary, whatever the host has learned.
    "tamiyo.controller=periodic",
    "tamiyo.period=1",
)
"""A run of some seconds in which blocks are asked for."""
_ASKED = ("conv-16x24x24", "conv-32x12x12", "conv-64x6x6", "sequence-64x32", "vector-24")


def timed(calls: Sequence[Callable[[], object]], count: int) -> list[float]:
    """Microseconds of ``count`` calls, taken in turns after a first round."""
    for call in calls:
        call()
    taken = []
    for number in range(count):
        call = calls[number % len(calls)]
        start = time.perf_counter()
        call()
        taken.append((time.perf_counter() - start) * 1e6)
    return taken


def in_process(count: int) -> dict[str, float]:
    librarian = Librarian()
    signatures = [SlotSignature.parse(text) for text in _ASKED]
    calls: list[Callable[[], object]] = []
    for signature in signatures:
        calls.append(lambda signature=signature: librarian.query(signature))  # type: ignore[misc]
        calls.append(lambda signature=signature: librarian.query(signature, parameter_budget=9000, offer="wide"))  # type: ignore[misc]
        calls.append(lambda: librarian.get("BP009"))
    taken = timed(calls, count)
    fresh = Catalog()
    first = []
    for number in range(max(1000, count // 100)):
        signature = SlotSignature("conv", (4 + number // 60, 4 + number % 60, 4))
        start = time.perf_counter()
        fresh.query(signature)
        first.append((time.perf_counter() - start) * 1e6)
    return {
        "lookup_p50_us": percentile(taken, 50),
        "lookup_p99_us": percentile(taken, 99),
        "first_query_p50_us": percentile(first, 50),
        "first_query_p99_us": percentile(first, 99),
    }


def in_the_actors(count: int, runs: int) -> dict[str, float]:
    """Bring the system up, ask Karn and Urza, and let short runs ask Urza."""
    with tempfile.TemporaryDirectory(prefix="esper-") as home:
        own = (f"home={home}", "ray.namespace=catalog", "nissa.port=0")
        config = configuration.load(None, [*own, *_SHORT])
        with connect(config, say=common.console.print) as session:
            session.up()
            karn = ByName("karn", config.ray.namespace)
            hops = []
            for number in range(count):
                start = time.perf_counter()
                RayAnswer[Any](karn, "query", _ASKED[number % len(_ASKED)]).wait(30.0)
                hops.append((time.perf_counter() - start) * 1e3)
            health = RayAnswer[dict[str, Any]](karn, "health").wait(30.0)
            fetches = catalog_store.in_the_actor(session, count)
            hits = catalog_store.hit_rate(session, config, runs)
    assert health is not None
    return {
        **fetches,
        **hits,
        "lookup_actor_p99_ms": health["lookup_p99_ms"],
        "hop_p50_ms": percentile(hops, 50),
        "hop_p99_ms": percentile(hops, 99),
    }


def estimates() -> dict[str, float]:
    """How far the estimated step is from the measured one, over all usable blueprints in two slots each."""
    torch.set_num_threads(1)
    off = []
    for signature in (SLOTS[1], SLOTS[5]):
        answer = CATALOG.query(signature, tier_ceiling=BlueprintTier.EXPERIMENTAL, offer="wide")
        for blueprint in answer.candidates:
            branch = build(blueprint.id, signature, tier_ceiling=BlueprintTier.EXPERIMENTAL)
            h = torch.randn(BATCH, *signature.shape, requires_grad=True)

            def step(branch: torch.nn.Module = branch, h: torch.Tensor = h) -> None:
                delta = branch(h)
                if delta.requires_grad:
                    torch.autograd.grad(delta, [h, *branch.parameters()], torch.ones_like(delta))

            measured = compiler.measure([step], 5, 20.0, time.process_time)[0]
            ratio = blueprint.latency_ms(signature, batch=BATCH) / max(measured, 1e-3)
            off.append(max(ratio, 1.0 / ratio))
            common.console.print(f"{blueprint.id} {signature}: {measured:.2f} ms, estimated {ratio * measured:.2f}")
    return {"latency_off_p50_ratio": percentile(off, 50), "latency_off_p90_ratio": percentile(off, 90)}


def measure(count: int, runs: int) -> dict[str, Any]:
    return {
        **in_process(count),
        **catalog_store.in_process(count // 10),
        **catalog_store.recovery(),
        **estimates(),
        **in_the_actors(max(1000, count // 100), runs),
    }


def main() -> None:
    given = common.parser(__doc__).parse_args()
    common.run("catalog", BARS, lambda: measure(100_000, 2) if given.quick else measure(1_000_000, 8), given.json)


if __name__ == "__main__":
    main()
