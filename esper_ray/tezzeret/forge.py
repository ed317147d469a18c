"""The forge: makes every wanted kernel, then compiles those for which compiling pays. Loads no torch itself.

Two phases, each in a job process that may be killed at any time. ``build`` makes eager kernels, checked and measured,
within seconds, for training waits for them. ``compile`` measures each of them compiled, in the background; where that
is faster by ``forge.speedup`` a new version with the strategy "compiled" is stored, else the figures are written down.

Contract: what a phase has reported as done is stored and in the ledger. A forge that was killed goes on where it was;
nothing finished is made again as long as the store still has it.
"""

from __future__ import annotations

import base64
import fcntl
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from esper_ray.config import ForgeConfig
from esper_ray.contracts.enums import BlueprintTier
from esper_ray.contracts.messages import MetricPoint
from esper_ray.contracts.ports import Kernel, KernelSpec, Publisher, SlotSignature
from esper_ray.contracts.telemetry import publish_telemetry
from esper_ray.errors import EnvironmentFault
from esper_ray.karn.catalog import CATALOG, Catalog
from esper_ray.reliability.atomic import make_folder
from esper_ray.reliability.clock import SYSTEM_CLOCK, Clock
from esper_ray.tezzeret.ledger import Finished, Ledger, Result
from esper_ray.tezzeret.toolchain import JOB_COMMAND, Phase, cache_key, compiler_available
from esper_ray.tezzeret.worker import Event, Job
from esper_ray.urza.catalog import Row

MAX_RETRIES = 2
_MAX_FALSE_STARTS = 3
_KEY_FIELD: Mapping[Phase, str] = {"eager": "cache_key", "compile": "compile_key"}
_RESULT: Mapping[Phase, Result] = {"eager": "eager", "compile": "compiled"}
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
        command: how a job process is started.
    """

    def __init__(
        self,
        store: KernelStore,
        folder: Path,
        config: ForgeConfig,
        *,
        publisher: Publisher | None = None,
        clock: Clock = SYSTEM_CLOCK,
        command: Sequence[str] = JOB_COMMAND,
    ) -> None:
        self.folder = make_folder(folder)
        self.ledger = Ledger(folder / "jobs.db", clock=clock)
        self._store, self._config, self._publisher = store, config, publisher
        self._clock, self._command = clock, command
        self._started_at = clock.monotonic()

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
        """The kernels of an order, see `wanted_of`, without repetitions."""
        specs: list[KernelSpec] = []
        for name in names:
            wanted = wanted_of(name)
            specs += self.wanted([wanted]) if isinstance(wanted, SlotSignature) else [wanted]
        return list({spec.key: spec for spec in specs}.values())

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
        if self._config.compile == "never":
            return Outcome({}, note="The kernels stay eager: forge.compile is never.")
        able, reason = compiler_available()
        if not able:
            return Outcome({}, note=f"The kernels stay eager: {reason}.")
        built = {row.key: row for row in self._store.list()}
        worth = [spec for spec in specs if spec.key in built and built[spec.key].metadata.get("parameters_count")]
        return self._run("compile", worth, on_progress, stop)

    def close(self) -> None:
        self.ledger.close()

    def _run(
        self, phase: Phase, specs: Sequence[KernelSpec], on_progress: Progress, stop: Callable[[], bool]
    ) -> Outcome:
        with self._alone():
            finished = self._settled(phase, specs)
            on_progress(len(finished), len(specs), "")
            false_starts = 0
            while (queue := [spec for spec in specs if spec.key not in finished]) and not stop():
                for event in self._work(phase, queue, stop):
                    spec = queue[event.index]
                    if event.kind == "started":
                        self._started_at = self._clock.monotonic()
                    elif event.index >= 0:
                        ended = self._settle(phase, spec, event)
                        finished.update({spec.key: ended} if ended else {})
                        self._tell(phase, ended, len(finished), len(specs))
                    elif event.kind == "ended":
                        false_starts = self._count_false_start(false_starts, event)
                    on_progress(len(finished), len(specs), spec.key if event.index >= 0 else "")
            return Outcome(finished, stopped=bool(queue))

    def _work(self, phase: Phase, queue: Sequence[KernelSpec], stop: Callable[[], bool]) -> Iterator[Event]:
        """What happens to the kernels of one job process; an orderly end and a stop are no events of a kernel."""
        with Job(
            phase,
            queue,
            self.folder,
            limit_seconds=self._config.job_seconds,
            memory_mb=self._config.memory_mb,
            command=self._command,
        ) as job:
            for event in job.events(stop):
                if event.kind != "stopped" and (event.kind != "ended" or event.why):
                    yield event

    def _settled(self, phase: Phase, specs: Sequence[KernelSpec]) -> dict[str, Finished]:
        """The jobs that need not be done, by kernel name: the ledger's, and those stored just before a kill."""
        field = _KEY_FIELD[phase]
        rows = self._store.list()
        stored = {row.metadata[field]: row for row in rows if field in row.metadata}
        digests = {row.digest for row in rows}
        settled: dict[str, Finished] = {}
        for spec in specs:
            key = cache_key(spec, phase)
            ended = self.ledger.finished(phase, key)
            if ended is not None and ended.digest and ended.digest not in digests:
                self.ledger.reopen(phase, key)
                ended = None
            if ended is None and key in stored:
                ended = Finished(spec.key, _RESULT[phase], stored[key].digest)
                self.ledger.finish(phase, key, ended)
            if ended is not None:
                settled[spec.key] = ended
        return settled

    def _settle(self, phase: Phase, spec: KernelSpec, event: Event) -> Finished | None:
        """Store what a job made, or count its failure; None when it is to be tried again."""
        key = cache_key(spec, phase)
        if event.kind == "done":
            assert event.content is not None
            store = self._store_eager if phase == "eager" else self._store_compared
            ended = store(spec, key, event.content)
        elif self.ledger.fail(phase, key, event.why) > MAX_RETRIES:
            ended = Finished(spec.key, "given up", why=event.why)
        else:
            return None
        self.ledger.finish(phase, key, ended)
        return ended

    def _store_eager(self, spec: KernelSpec, key: str, content: Mapping[str, Any]) -> Finished:
        metadata = {**content["metadata"], _KEY_FIELD["eager"]: key}
        kernel = self._store.put(spec, base64.b64decode(content["weights"]), metadata)
        return Finished(spec.key, "eager", kernel.digest)

    def _store_compared(self, spec: KernelSpec, key: str, content: Mapping[str, Any]) -> Finished:
        figures = content["metadata"]
        newest = {row.key: row.digest for row in self._store.list()}[spec.key]
        if figures["eager_ms"] < self._config.speedup * figures["compiled_ms"]:
            return Finished(spec.key, "eager", newest, figures)
        kernel = self._store.get_digest(newest)
        metadata = {**kernel.metadata, **figures, "strategy": "compiled", _KEY_FIELD["compile"]: key}
        return Finished(spec.key, "compiled", self._store.put(spec, kernel.weights, metadata).digest, figures)

    def _count_false_start(self, count: int, event: Event) -> int:
        if count + 1 >= _MAX_FALSE_STARTS:
            raise EnvironmentFault(
                "The forge's jobs end before they begin.", why=event.why, remedy=f"See the logs in {self.folder}."
            )
        return count + 1

    def _tell(self, phase: Phase, ended: Finished | None, done: int, wanted: int) -> None:
        if self._publisher is None:
            return
        labels = {"phase": phase}
        points = [
            MetricPoint("zd", float(done), labels),
            MetricPoint("zw", float(wanted), labels),
            MetricPoint("zt", (self._clock.monotonic() - self._started_at) * 1e3, labels),
            MetricPoint("zr", float(ended is None), labels),
            MetricPoint("zg", float(ended is not None and ended.result == "given up"), labels),
            MetricPoint("zc", float(ended is not None and ended.result == "compiled")),
        ]
        publish_telemetry(self._publisher, "tezzeret", "", 0, points)

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
