"""The interfaces between rooms of one floor. A room is given these; it never imports its neighbour.

Implementations over Ray live in ``actors/``; in-process ones are what tests and benchmarks use.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar

from esper_ray.contracts.enums import BusMessageType, MessagePriority
from esper_ray.errors import BlueprintError

T = TypeVar("T", covariant=True)
SlotKind = Literal["conv", "sequence", "vector"]
_RANK: dict[SlotKind, int] = {"conv": 3, "sequence": 2, "vector": 1}


@dataclass(frozen=True, slots=True)
class SlotSignature:
    """What a block must fit: the shape of one sample at the slot, (C, H, W), (T, D) or (D,), its type and device."""

    kind: SlotKind
    shape: tuple[int, ...]
    dtype: str = "float32"
    device: str = "cpu"

    def __post_init__(self) -> None:
        if len(self.shape) != _RANK[self.kind] or min(self.shape) < 1:
            raise BlueprintError(f"{self.shape} is no shape of a {self.kind} slot.")

    def __str__(self) -> str:
        return f"{self.kind}-{'x'.join(map(str, self.shape))}-{self.dtype}-{self.device}"

    @classmethod
    def parse(cls, text: str) -> SlotSignature:
        """The inverse of ``str()``; the type and device may be left out.

        Raises:
            BlueprintError: the text has another form.
        """
        try:
            kind, shape, *rest = text.split("-")
            return cls(kind, tuple(int(size) for size in shape.split("x")), *rest)  # type: ignore[arg-type]
        except (ValueError, TypeError, KeyError):
            raise BlueprintError(
                f"{text!r} is no slot signature.", remedy="Write it like conv-32x12x12-float32-cpu."
            ) from None


@dataclass(frozen=True, slots=True)
class KernelSpec:
    """Which kernel: a blueprint (``BP009``) with parameters, for one slot signature."""

    blueprint: str
    signature: SlotSignature
    parameters: Mapping[str, float] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """One string that names it, in journals and catalogues."""
        values = ",".join(f"{name}={value:g}" for name, value in sorted(self.parameters.items()))
        return f"{self.blueprint}[{values}]@{self.signature}"


@dataclass(frozen=True, slots=True)
class Kernel:
    """A ready artifact: weights as safetensors bytes, and what the forge found out about the block.

    ``weights`` are ``bytes``, or a read-only ``memoryview`` where they lie in memory that processes share.
    ``metadata`` has at least: ``parameters_count``, ``flops_forward`` and ``flops_backward`` per sample,
    ``strategy`` ("eager" or "compiled"), ``eager_ms``, ``compiled_ms`` (None where not measured), ``torch``.
    """

    spec: KernelSpec
    digest: str
    metadata: Mapping[str, Any]
    weights: bytes | memoryview


class Answer(Protocol[T]):
    """Something asked for without waiting."""

    def wait(self, timeout: float | None) -> T | None:
        """The answer, or None when it is not there within ``timeout`` seconds (0 polls, None waits for good).

        Raises:
            EsperError: the asked side failed or refused; the text says which.
        """
        ...


class KernelSource(Protocol):
    """Where Kasmina gets kernels from (Urza)."""

    def fetch(self, spec: KernelSpec) -> Answer[Kernel]: ...


@dataclass(frozen=True, slots=True)
class SlotInfo:
    """A slot as Tamiyo knows it: sent once per run."""

    index: int
    name: str
    signature: SlotSignature


@dataclass(frozen=True, slots=True)
class Candidate:
    """A blueprint that may grow in a slot, as Karn offers it: its size there and its forward FLOPs per sample."""

    slot: int
    blueprint: int
    family: str
    parameters: int
    flops: int


LAYER_STATISTICS = ("weight_rms", "gradient_rms", "gradient_ratio")
"""The columns of what a boundary tells of each layer: logarithms to base 10, -12 where there is nothing to measure."""


@dataclass(frozen=True, slots=True)
class LayerInfo:
    """A leaf module of the host; ``inputs`` and ``outputs`` are its channels or features, 0 where it has none."""

    name: str
    kind: str
    parameters: int
    inputs: int
    outputs: int


@dataclass(frozen=True, slots=True)
class HostGraph:
    """The host as it computes: layers in the order of their first call, and which feeds which.

    Attributes:
        edges: (source, target) as indices of ``layers``.
        slot_layers: for each slot the index of the layer behind which it sits.
    """

    layers: tuple[LayerInfo, ...]
    edges: tuple[tuple[int, int], ...]
    slot_layers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RunOpening:
    """What a decider is told when a run starts or resumes: states of epochs after ``epoch`` are forgotten.

    ``max_flops`` and ``host_flops`` are of one sample's forward pass; without a limit both may be 0.
    ``probation_epochs`` is the least stay of a seed on probation. With ``lockstep`` nothing that a clock or the machine
    says decides anything.
    ``settings`` is the run's own ``tamiyo`` section: the decider's process may have been started with another one.
    ``parent`` is the run that this one was forked from, empty for one that began by itself; with the opening that
    begins it comes what a person decided there, as commands in hexadecimal: ``ordered``.
    """

    run: str
    seed: int
    slots: tuple[SlotInfo, ...]
    candidates: tuple[Candidate, ...]
    controller: str
    epochs: int
    host_parameters: int
    max_parameters: int
    epoch: int = 0
    branch: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)
    graph: HostGraph | None = None
    max_flops: float = 0.0
    host_flops: float = 0.0
    probation_epochs: int = 1
    lockstep: bool = False
    parent: str = ""
    ordered: tuple[str, ...] = ()


class Decider(Protocol):
    """Who decides at a boundary (Tamiyo)."""

    def open_run(self, opening: RunOpening) -> None:
        """Idempotent: the same opening twice changes nothing."""
        ...

    def reopen(self, opening: RunOpening) -> Answer[bool]:
        """The same without waiting, for a run that was rolled back: what came after ``opening.epoch`` is undone."""
        ...

    def decide(self, run: str, state: Sequence[bytes]) -> Answer[list[bytes]]:
        """Signed state envelopes in, signed command envelopes out; the same state twice gives the same commands.

        Among the envelopes may be one of payload type "GraphStatistics": float32 [layers, LAYER_STATISTICS], raw.
        """
        ...

    def close_run(self, run: str) -> None:
        """The run is over: close what is still being observed."""
        ...


class Publisher(Protocol):
    """The way onto the bus; never blocks and never raises for a bus that is away."""

    def publish(
        self,
        type: BusMessageType,
        payload: bytes,
        *,
        priority: MessagePriority = MessagePriority.NORMAL,
        event_id: bytes | None = None,
    ) -> None: ...
