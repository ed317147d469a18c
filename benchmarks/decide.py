"""Tamiyo's answer with a learned policy, the hop to her actor included, with one training process beside it.

The system is up and the policy is loaded by the real actor; this process is the one that asks, as Tolaria does, with
signed states of short runs whose seeds live and die as the answers say. The policy is a new one that draws its actions:
it does all that a trained one does, and germinates more.

- ``hop_*``: from the call to the answer; between two calls this process rests, so that caches are as cold as in a run.
- ``forward_*``: one pass of the network over the same observations, in this process. An answer takes ``passes_mean``.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import common
from benchmarks.common import Bar, percentile
from esper_ray import config as configuration
from esper_ray.actors.clients import RemoteDecider
from esper_ray.actors.resources import take_priority
from esper_ray.config import Config
from esper_ray.contracts import codec
from esper_ray.contracts.budgets import DECIDE_MS
from esper_ray.contracts.enums import BusMessageType, SeedOperation
from esper_ray.contracts.enums import SeedLifecycleStage as Stage
from esper_ray.contracts.messages import AdaptationCommand, SeedState, SystemState
from esper_ray.contracts.ports import LAYER_STATISTICS, RunOpening
from esper_ray.contracts.signing import Signer, Verifier, load_keys
from esper_ray.inprocess import candidates
from esper_ray.runtime import connect
from esper_ray.tamiyo import graph, policy_store
from esper_ray.tamiyo.controller import STATISTICS_TYPE
from esper_ray.tamiyo.policy import GraphPolicy
from esper_ray.tamiyo.view import RunView
from esper_ray.tasks import build_task

BARS = (Bar("hop_p50_ms", DECIDE_MS.limit / 2), Bar("hop_p99_ms", DECIDE_MS.limit))
EPOCHS = 20
REST_SECONDS = 0.2
"""Between two answers. In a run it is a second or more; what an answer sets off on the bus is mostly done by then."""
GIVE_UP_SECONDS = 10.0
_LIFE = (Stage.GERMINATED, Stage.TRAINING, Stage.BLENDING, Stage.SHADOWING, Stage.PROBATIONARY)


def train(settings: Sequence[str], ready: Event, stop: Event) -> None:
    """The process beside: trains a host on one thread until it is told to stop, with Tolaria's rank."""
    torch.set_num_threads(1)
    take_priority("tolaria")
    config = configuration.load(None, list(settings))
    task = build_task(config.run, config.home / "data", torch.device("cpu"))
    optimizer = torch.optim.SGD(task.model.parameters(), 0.01)
    data, batch, start = task.data.train, config.run.batch_size, 0
    while not stop.is_set():
        start = (start + batch) % max(1, len(data) - batch)
        optimizer.zero_grad()
        task.loss(task.model(data.inputs[start : start + batch]), data.targets[start : start + batch]).backward()
        optimizer.step()
        ready.set()


@contextlib.contextmanager
def training(settings: Sequence[str]) -> Iterator[None]:
    """Have the process beside."""
    context = multiprocessing.get_context("spawn")
    ready, stop = context.Event(), context.Event()
    process = context.Process(target=train, args=(settings, ready, stop), daemon=True)
    process.start()
    try:
        if not ready.wait(120):
            raise SystemExit("the training process beside did not start")
        yield
    finally:
        stop.set()
        process.join(30)


class Lives:
    """The states of one run of made-up figures, and seeds that do what they are told."""

    def __init__(self, opening: RunOpening, random: np.random.Generator) -> None:
        self.opening, self._random = opening, random
        self._seeds: dict[int, SeedState] = {}
        self._born = 0

    def state(self, epoch: int) -> tuple[SystemState, np.ndarray[Any, Any]]:
        """The next boundary's state and statistics of the layers."""
        loss = 2.0 * 0.9**epoch + 0.02 * float(self._random.normal())
        layers = len(self.opening.graph.layers) if self.opening.graph else 0
        statistics = self._random.normal(-2.0, 1.0, (layers, len(LAYER_STATISTICS))).astype(np.float32)
        return SystemState(
            run=self.opening.run,
            epoch=epoch,
            global_step=epoch * 40,
            timestamp_ns=time.time_ns(),
            training_loss=loss,
            validation_loss=loss * 1.1,
            validation_accuracy=1.0 - loss / 3.0,
            metrics={"lr": 0.05, "cr": 1.0},
            seeds=tuple(self._seeds.values()),
        ), statistics

    def follow(self, commands: Sequence[AdaptationCommand]) -> None:
        """Let an epoch pass with these commands."""
        for slot, seed in self._seeds.items():
            if seed.stage in _LIFE[:-1]:
                stage = _LIFE[_LIFE.index(seed.stage) + 1]
                metrics = {"g": float(self._random.normal(0.0, 0.02)), "ge": 0.005} if stage in _LIFE[2:] else {}
                self._seeds[slot] = seed._replace(
                    stage=stage, alpha=0.5, age_epochs=seed.age_epochs + 1, metrics=metrics
                )
        for each in commands:
            directive = each.seed_directive
            if directive is None:
                continue
            if directive.operation is SeedOperation.GERMINATE:
                self._born += 1
                self._seeds[each.slot] = SeedState(self._born, each.slot, directive.blueprint, Stage.GERMINATED)
            elif directive.operation is SeedOperation.CULL:
                del self._seeds[each.slot]
            else:
                self._seeds[each.slot] = self._seeds[each.slot]._replace(stage=Stage.FOSSILIZED, alpha=1.0)


def hops(config: Config, opening: RunOpening, count: int) -> tuple[list[float], list[int], list[graph.Observation]]:
    """Ask ``count`` times: milliseconds, commands of each answer, and what Tamiyo saw before its first step."""
    keys = load_keys(config.home / "keys" / "signing")
    decider, signer, verifier = RemoteDecider(config.ray.namespace), Signer(keys, "tolaria"), Verifier(keys)
    taken: list[float] = []
    passes: list[int] = []
    seen: list[graph.Observation] = []
    for number in range(-(-count // EPOCHS)):
        lives = Lives(replace(opening, run=f"decide-{number}", seed=number), np.random.default_rng(number))
        view = RunView(lives.opening, config.tamiyo)
        decider.open_run(lives.opening)
        for epoch in range(1, EPOCHS + 1):
            state, statistics = lives.state(epoch)
            view.states.append(state)
            view.statistics = statistics
            seen.append(graph.observe(view))
            told = [("SystemStatePacket", packet) for packet in codec.encode_state(state)]
            told.append((STATISTICS_TYPE, statistics.tobytes()))
            sealed = [signer.seal(data, BusMessageType.SYSTEM_STATE, payload_type=kind) for kind, data in told]
            time.sleep(REST_SECONDS)
            start = time.perf_counter()
            answer = decider.decide(lives.opening.run, sealed).wait(GIVE_UP_SECONDS)
            taken.append((time.perf_counter() - start) * 1e3)
            if answer is None:
                raise SystemExit(f"Tamiyo gave no answer within {GIVE_UP_SECONDS:g} s")
            commands = [codec.decode_command(verifier.open_direct(data).payload) for data in answer]
            if any(each.issued_by != config.tamiyo.policy for each in commands):
                raise SystemExit("somebody else than the policy decided")
            given = sum(each.seed_directive is not None for each in commands)
            passes.append(min(given + 1, 4))
            lives.follow(commands)
        decider.close_run(lives.opening.run)
    return taken, passes, seen


def forwards(policy: GraphPolicy, seen: Sequence[graph.Observation]) -> list[float]:
    """Milliseconds of one pass over each observation."""
    torch.set_num_threads(1)
    generator, taken = torch.Generator().manual_seed(0), []
    with torch.inference_mode():
        for observation in seen:
            tensors = {name: torch.from_numpy(array).unsqueeze(0) for name, array in observation.items()}
            start = time.perf_counter()
            policy.act(tensors, generator=generator)
            taken.append((time.perf_counter() - start) * 1e3)
    return taken


def measure(count: int) -> dict[str, Any]:
    """Bring the system up, ask, and take it down."""
    with tempfile.TemporaryDirectory(prefix="esper-") as home:
        torch.manual_seed(0)
        policy = GraphPolicy().eval()
        policy_id = policy_store.save(Path(home), policy, training={"algo": "none"})
        settings = [
            f"home={home}", "run.dataset=digits", "ray.namespace=decide", "nissa.port=0", "forge.compile=never",
            "tamiyo.controller=learned", f"tamiyo.policy={policy_id}", "tamiyo.greedy=false",
        ]  # fmt: skip
        config = configuration.load(None, settings)
        with connect(config, say=common.console.print) as session:
            session.up()
            task = build_task(config.run, config.home / "data", torch.device("cpu"))
            opening = RunOpening(
                run="decide",
                seed=0,
                slots=task.slots,
                candidates=tuple(each for slot in task.slots for each in candidates(slot)),
                controller=config.tamiyo.controller,
                epochs=EPOCHS,
                host_parameters=sum(each.numel() for each in task.model.parameters()),
                max_parameters=config.run.max_parameters,
                settings=config.tamiyo.model_dump(mode="json"),
                graph=task.graph,
            )
            with training(settings):
                # It asks as Tolaria does, so it ranks as she does.
                take_priority("tolaria")
                taken, passes, seen = hops(config, opening, count)
                alone = forwards(policy, seen)
    return {
        "answers": len(taken),
        "hop_p50_ms": percentile(taken, 50),
        "hop_p99_ms": percentile(taken, 99),
        "late_percent": 100.0 * sum(each > DECIDE_MS.limit for each in taken) / len(taken),
        "forward_p50_ms": percentile(alone, 50),
        "forward_p99_ms": percentile(alone, 99),
        "passes_mean": sum(passes) / len(passes),
        "parameters": sum(each.numel() for each in policy.parameters()),
    }


def main() -> None:
    given = common.parser(__doc__).parse_args()
    common.run("decide", BARS, lambda: measure(600 if given.quick else 3000), given.json)


if __name__ == "__main__":
    main()
