"""Openings of runs and the statistics of their layers, as Tamiyo's journal has them and back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from esper_ray.config import TamiyoConfig
from esper_ray.contracts.ports import (
    LAYER_STATISTICS,
    Candidate,
    HostGraph,
    LayerInfo,
    RunOpening,
    SlotInfo,
    SlotSignature,
)


def to_bytes(opening: RunOpening) -> bytes:
    return json.dumps(asdict(opening)).encode()


def from_bytes(data: bytes) -> RunOpening:
    """The inverse; what an older or a newer version wrote beside it is left out."""
    given: dict[str, Any] = json.loads(data)
    slots = tuple(
        SlotInfo(
            row["index"], row["name"], SlotSignature(**{**row["signature"], "shape": tuple(row["signature"]["shape"])})
        )
        for row in given["slots"]
    )
    candidates = tuple(Candidate(**row) for row in given["candidates"])
    made = {**given, "slots": slots, "candidates": candidates, "graph": _graph(given.get("graph"))}
    made["ordered"] = tuple(given.get("ordered", ()))
    known = {field.name for field in fields(RunOpening)}
    return RunOpening(**{name: value for name, value in made.items() if name in known})


def settings_of(opening: RunOpening) -> TamiyoConfig:
    """The run's own ``tamiyo`` section; a key that is no longer there is left out."""
    known = TamiyoConfig.model_fields
    return TamiyoConfig(**{name: value for name, value in opening.settings.items() if name in known})


def statistics(data: bytes) -> npt.NDArray[np.float32] | None:
    """float32 [layers, LAYER_STATISTICS]; None where none came, or what came has another shape."""
    row = 4 * len(LAYER_STATISTICS)
    if not data or len(data) % row:
        return None
    return np.frombuffer(data, np.float32).reshape(-1, len(LAYER_STATISTICS))


def _graph(data: Mapping[str, Any] | None) -> HostGraph | None:
    if data is None:
        return None
    return HostGraph(
        layers=tuple(LayerInfo(**row) for row in data["layers"]),
        edges=tuple((int(source), int(target)) for source, target in data["edges"]),
        slot_layers=tuple(data["slot_layers"]),
    )
