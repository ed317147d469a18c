"""The forge: makes every wanted kernel, then compiles those for which compiling pays. Loads no torch itself.

Two phases, each in job processes that may be killed at any time. ``build`` makes eager kernels, checked and measured,
within seconds, for training waits for them. ``compile`` measures each of them compiled, in the background, and stores a
new version with the figures, whose strategy is "compiled" where that is faster by ``forge.speedup`` and "eager" else.

Contract: what a phase has reported as done is stored and in the ledger. A forge that was killed goes on where it was;
nothing finished is made again as long as the store still has it.
"""

from __future__ import annotations

import base64
import fcntl
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, Protocol

import psutil

from esper_ray.config import ForgeConfig
from esper_ray.contracts import catalogue, codec
from esper_ray.contracts.enums import BlueprintTier, BusMessageType
from esper_ray.contracts.keys import KeyRing
from esper_ray.contracts.messages import KernelCatalogUpdate, KernelPrefetchError, MetricPoint, blueprint_number
from esper_ray.contracts.ports import Kernel, KernelSpec, Publisher, SlotSignature
from esper_ray.contracts.telemetry import publish_telemetry
from esper_ray.errors import EnvironmentFault
from esper_ray.karn.catalog import CATALOG, Catalog
from esper_ray.reliability.atomic import make_folder
from esper_ray.reliability.clock import SYSTEM_CLOCK, Clock
from esper_ray.tezzeret import seal
from esper_ray.tezzeret.caution import Caution
from esper_ray.tezzeret.crew import Crew
from esper_ray.tezzeret.ledger import Finished, Ledger, Result
from esper_ray.tezzeret.strategies import StrategyName, calmer
from esper_ray.tezzeret.toolchain import JOB_COMMAND, Phase, cache_key, compiler_available
from esper_ray.tezzeret.worker import Event, Job, Limits
from esper_ray.urza.catalog import Row

MAX_RETRIES = 2
_MAX_FALSE_STARTS = 3
_WHY_LETTERS = 500
_KEY_FIELD: Mapping[Phase, str] = {"eager": "cache_key", "compile": "compile_key"}
FIGURES = ("eager_ms", "compiled_ms", "compile_seconds", "compile_busy_seconds")
"""What the compile phase measures of a kernel, see `compiler.compare`."""

_log = logging.getLogger(__name__)
Progress = Callable[[int, int, str], None]


class KernelStore(Protocol):
    """What the forge needs of Urza; `urza.store.Store` is one, and so is the way to Urza's actor."""

    def put(self, spec: KernelSpec, weights: bytes, metadata: Mapping[str, Any]) -> Kernel: ...

    def get_digest(self, digest: str) -> Kernel: ...

    def list(self) -> list[Row]: ...


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a phase came to: the jobs that ended by kernel name, whether it was stopped, and what is to be said."""

    finished: Mapping[str, Finished]
    stopped: bool = False
    note: str = ""

    @property
    def given_up(self) -> dict[str, str]:
        """Kernels without a result, and why."""
        return {key: item.why for key, item in self.finished.items() if item.result == "given up"}


def wanted_of(text: str) -> SlotSignature | KernelSpec:
    """What one item of an order means: all that a slot is offered by default, or one kernel, BP036@SIGNATURE.

    Raises:
        BlueprintError: it is neither, or the kernel does not fit or is quarantined.
    """
    blueprint, at, signature = text.rpartition("@")
    if not at:
        return SlotSignature.parse(text)
    return CATALOG.get(blueprint, tier_ceiling=BlueprintTier.EXPERIMENTAL).spec(SlotSignature.parse(signature))


def _never() -> bool:
    return False


def _silent(done: int, total: int, current: str) -> None:
    del done, total, current


class Forge:
    """Makes kernels into a store.

    Args:
        folder: ledger, compiled code and logs; one forge at a time works in it.
        publisher: where progress, retries and times are sent.
        background: kernels are compiled only when nobody else wants the processor; building is never put off so.
        keys: what kernels are sealed with; those in the store that these keys did not seal are made again.
        command: how a job process is started.
    """

    def __init__(
        self,
        store: KernelStore,
        folder: Path,
        config: ForgeConfig,
        *,
        keys: KeyRing,
        background: bool = True,
        publisher: Publisher | None = None,
        clock: Clock = SYSTEM_CLOCK,
        command: Sequence[str] = JOB_COMMAND,
    ) -> None:
        self.folder = make_folder(folder)
        self.ledger = Ledger(folder / "jobs.db", clock=clock)
        self._store, self._config, self._publisher, self._keys = store, config, publisher, keys
        self._command, self._background = command, background
        self._caution = Caution(config.dwell_seconds, clock, self._tell_mode)

    def wanted(
        self,
        signatures: Iterable[SlotSignature],
        catalog: Catalog = CATALOG,
        *,
        tier_ceiling: BlueprintTier = BlueprintTier.SAFE,
        parameter_budget: int | None = None,
    ) -> list[KernelSpec]:
        """A kernel with default parameters for each blueprint that fits each slot, without repetitions."""
        specs = [
            blueprint.spec(signature)
            for signature in signatures
            for blueprint in catalog.query(
                signature, tier_ceiling=tier_ceiling, parameter_budget=parameter_budget
            ).candidates
        ]
        return list({spec.key: spec for spec in specs}.values())

    def ordered(self, names: Iterable[str]) -> list[KernelSpec]:
        """The kernels of an order, see `wanted_of`, without repetitions, in the order in which they are missed.

        A seed's first wish is the block that computes most, so these come first, one for each slot in turn.
        """
        by_slot: dict[SlotSignature, dict[str, KernelSpec]] = {}
        for name in names:
            wanted = wanted_of(name)
            for spec in self.wanted([wanted]) if isinstance(wanted, SlotSignature) else [wanted]:
                by_slot.setdefault(spec.signature, {})[spec.key] = spec
        cost = {blueprint.id: blueprint.flops for blueprint in CATALOG}
        strongest = [
            sorted(specs.values(), key=lambda spec: cost[spec.blueprint](spec.signature), reverse=True)
            for specs in by_slot.values()
        ]
        turns = zip_longest(*strongest)
        return [spec for turn in turns for spec in turn if spec is not None]

    def build(
        self, specs: Sequence[KernelSpec], on_progress: Progress = _silent, stop: Callable[[], bool] = _never
    ) -> Outcome:
        """Make, check and store every kernel that the store does not have.

        Raises:
            EnvironmentFault: another forge works in this folder, or jobs do not start at all.
        """
        return self._run("eager", specs, on_progress, stop)

    def compile(
        self, specs: Sequence[KernelSpec], on_progress: Progress = _silent, stop: Callable[[], bool] = _never
    ) -> Outcome:
        """Measure every built kernel compiled, where this machine can compile; errors as for `build`."""
        if self._config.compile == "never" or self._config.strategy == "emergency":
            setting = "compile is never" if self._config.compile == "never" else "strategy is emergency"
            return Outcome({}, note=f"The kernels stay eager: forge.{setting}.")
        able, reason = compiler_available()
        if not able:
            return Outcome({}, note=f"The kernels stay eager: {reason}.")
        built = {row.key: row for row in self._ours()}
        worth = [spec for spec in specs if spec.key in built and built[spec.key].metadata.get("parameters_count")]
        return self._run("compile", worth, on_progress, stop)

    @property
    def conservative(self) -> bool:
        """Whether it works with one job and the fast strategy, after failures or while memory is short."""
        return self._caution.conservative

    def close(self) -> None:
        self.ledger.close()

    def _run(
        self, phase: Phase, specs: Sequence[KernelSpec], on_progress: Progress, stop: Callable[[], bool]
    ) -> Outcome:
        on_cpu = all(spec.signature.device == "cpu" for spec in specs)
        with self._alone(), Crew(lambda lane: self._hire(phase, lane, on_cpu)) as crew:
            finished = self._settled(phase, specs)
            queue = deque(spec for spec in specs if spec.key not in finished)
            on_progress(len(finished), len(specs), "")
            absent = 0
            while (queue or crew.busy) and not stop():
                self._hand_out(phase, queue, crew, lambda spec: on_progress(len(finished), len(specs), spec.key))
                for event in crew.wait():
                    absent = self._count_absent(absent, event)
                    ended = self._settle(phase, event)
                    finished.update({event.spec.key: ended} if ended else {})
                    queue.extend([] if ended else [event.spec])
                    self._tell(phase, event, ended, len(finished), len(specs))
                    on_progress(len(finished), len(specs), event.spec.key)
            self._caution.abandoned()
            if self._caution.conservative:
                self._tell_mode(False)
            return Outcome(finished, stopped=len(finished) < len(specs))

    def _hire(self, phase: Phase, lane: int, on_cpu: bool) -> Job:
        limits = Limits(self._config.job_seconds, self._config.memory_mb)
        background = self._background and phase == "compile"
        return Job(phase, self.folder, limits, lane=lane, on_cpu=on_cpu, background=background, command=self._command)

    def _hand_out(
        self, phase: Phase, queue: deque[KernelSpec], crew: Crew, on_begun: Callable[[KernelSpec], None]
    ) -> None:
        """Give the next kernels to as many jobs as may run now."""
        if psutil.virtual_memory().available < self._config.reserve_mb * 2**20:
            self._caution.short_of_memory()
        while queue and crew.busy < self._lanes():
            normal = self._caution.may_work_normally()
            spec = queue.popleft()
            crew.give(spec, self._strategy(phase, spec, normal=normal))
            on_begun(spec)
        crew.send_home(self._lanes())

    def _lanes(self) -> int:
        return 1 if self._caution.conservative else self._config.jobs

    def _strategy(self, phase: Phase, spec: KernelSpec, *, normal: bool = True) -> StrategyName:
        """What was asked for, or the fast one in conservative mode; a calmer one after each failure of that kernel."""
        wanted = self._config.strategy
        failures = self.ledger.failures(phase, cache_key(spec, phase, wanted))
        return calmer(wanted if normal else "fast", failures)

    def _settled(self, phase: Phase, specs: Sequence[KernelSpec]) -> dict[str, Finished]:
        """The jobs that need not be done, by kernel name: the ledger's, and those stored just before a kill."""
        field = _KEY_FIELD[phase]
        rows = self._ours()
        stored = {row.metadata[field]: row for row in rows if field in row.metadata}
        digests = {row.digest for row in rows}
        settled: dict[str, Finished] = {}
        for spec in specs:
            key = cache_key(spec, phase, self._strategy(phase, spec))
            ended = self.ledger.finished(phase, key)
            if ended is not None and ended.digest and ended.digest not in digests:
                self.ledger.reopen(phase, key)
                ended = None
            if ended is None and key in stored:
                ended = _as_stored(phase, spec, stored[key])
                self.ledger.finish(phase, key, ended)
            if ended is not None:
                settled[spec.key] = ended
        return settled

    def _settle(self, phase: Phase, event: Event) -> Finished | None:
        """Store what a job made, or count its failure; None when it is to be tried again."""
        if event.kind == "absent":
            return None
        spec = event.spec
        if event.kind == "done":
            key = cache_key(spec, phase, event.strategy)
            ended = self._store_eager(event, key) if phase == "eager" else self._store_compared(event, key)
            self._caution.succeeded()
        else:
            self._caution.failed(spec.key)
            if self.ledger.fail(phase, cache_key(spec, phase, self._config.strategy), event.why) <= MAX_RETRIES:
                return None
            key = cache_key(spec, phase, self._strategy(phase, spec))
            ended = Finished(spec.key, "given up", why=event.why)
        self.ledger.finish(phase, key, ended)
        return ended

    def _store_eager(self, event: Event, key: str) -> Finished:
        spec, content = event.spec, event.content
        metadata = {**content["metadata"], _KEY_FIELD["eager"]: key}
        return Finished(spec.key, "eager", self._put(spec, base64.b64decode(content["weights"]), metadata))

    def _store_compared(self, event: Event, key: str) -> Finished:
        """A new version with the figures, and with the faster of both as its strategy."""
        spec, figures = event.spec, event.content["metadata"]
        pays = figures["eager_ms"] >= self._config.speedup * figures["compiled_ms"]
        result: Result = "compiled" if pays else "eager"
        newest = {row.key: row.digest for row in self._ours()}[spec.key]
        kernel = self._store.get_digest(newest)
        chosen = {"strategy": result, "compile_strategy": event.strategy, _KEY_FIELD["compile"]: key}
        stored = self._put(spec, bytes(kernel.weights), {**kernel.metadata, **figures, **chosen})
        return Finished(spec.key, result, stored, figures)

    def _put(self, spec: KernelSpec, weights: bytes, metadata: Mapping[str, Any]) -> str:
        return self._store.put(spec, weights, seal.sealed(spec.key, weights, metadata, self._keys)).digest

    def _ours(self) -> list[Row]:
        """What is stored with a seal of ours, by name and version."""
        return [row for row in self._store.list() if not seal.fault(row.key, row.metadata, self._keys)]

    def _count_absent(self, count: int, event: Event) -> int:
        """Raises when jobs keep ending before they are ready: that is no kernel's fault."""
        if event.kind != "absent":
            return 0
        if count + 1 >= _MAX_FALSE_STARTS:
            raise EnvironmentFault(
                "The forge's jobs end before they begin.", why=event.why, remedy=f"See the logs in {self.folder}."
            )
        return count + 1

    def _tell(self, phase: Phase, event: Event, ended: Finished | None, done: int, wanted: int) -> None:
        if self._publisher is None:
            return
        labels = {"phase": phase}
        points = [
            MetricPoint("zd", float(done), labels),
            MetricPoint("zw", float(wanted), labels),
            MetricPoint("zt", event.seconds * 1e3, labels),
            MetricPoint("zr", float(ended is None and event.kind != "absent"), labels),
            MetricPoint("zg", float(ended is not None and ended.result == "given up"), labels),
            MetricPoint("zc", float(ended is not None and ended.result == "compiled")),
            MetricPoint("zm", float(self._caution.conservative)),
        ]
        publish_telemetry(self._publisher, "tezzeret", "", 0, points)
        if ended is not None and ended.digest:
            number, signature = blueprint_number(event.spec.blueprint), str(event.spec.signature)
            update = KernelCatalogUpdate(number, signature, ended.digest, event.seconds * 1e3)
            self._publisher.publish(BusMessageType.KERNEL_CATALOG_UPDATE, codec.encode_catalog_update(update))
        elif ended is not None and phase == "eager":
            why = f"{event.spec.signature}: {ended.why}"[:_WHY_LETTERS]
            error = KernelPrefetchError(0, blueprint_number(event.spec.blueprint), why)
            self._publisher.publish(BusMessageType.KERNEL_PREFETCH_ERROR, catalogue.encode_prefetch_error(error))

    def _tell_mode(self, conservative: bool) -> None:
        _log.info("the forge %s", "works conservatively now" if conservative else "is back to its ordinary way")
        if self._publisher is not None:
            publish_telemetry(self._publisher, "tezzeret", "", 0, [MetricPoint("zm", float(conservative))])

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with (self.folder / "forge.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise EnvironmentFault(
                    f"Another forge works in {self.folder}.", remedy="Wait for it, or stop it (esper down)."
                ) from None
            yield


def _as_stored(phase: Phase, spec: KernelSpec, row: Row) -> Finished:
    """How a job ended whose artifact was stored just before a kill."""
    if phase == "eager":
        return Finished(spec.key, "eager", row.digest)
    result: Result = "compiled" if row.strategy == "compiled" else "eager"
    figures = {name: row.metadata[name] for name in FIGURES if name in row.metadata}
    return Finished(spec.key, result, row.digest, figures)
