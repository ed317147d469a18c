"""Where observations are kept for Simic: one file each, under the name of its content.

A record on the bus names its observation by digest. While a run goes on its observations are in Tamiyo's journal; the
files are written when it is over, before its end is told, so that no boundary waits for them.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from safetensors.numpy import load, save

from esper_ray.errors import CorruptArtifact
from esper_ray.tamiyo.graph import Observation, observation_digest


def pack(observation: Observation) -> bytes:
    """As safetensors."""
    return bytes(save({key: np.ascontiguousarray(array) for key, array in observation.items()}))


def write(folder: Path, observation: Observation) -> str:
    """Keep an observation; returns its digest. Writing the same one twice changes nothing."""
    name = observation_digest(observation)
    file = path_of(folder, name)
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        beside = file.with_suffix(f".{os.getpid()}")
        beside.write_bytes(pack(observation))
        beside.replace(file)
    return name


def unpack(data: bytes) -> Observation:
    """The inverse of `pack`."""
    return dict(load(data))


def read(folder: Path, name: str) -> Observation:
    """The observation of that digest.

    Raises:
        CorruptArtifact: it is gone, or is not what its name says.
    """
    try:
        observation = load(path_of(folder, name).read_bytes())
    except Exception as error:
        # safetensors has a type of its own for each kind of damage, and a missing file is damage too.
        raise CorruptArtifact(f"The observation {name[:12]} cannot be read.", why=str(error)) from None
    if observation_digest(observation) != name:
        raise CorruptArtifact(f"The observation {name[:12]} is damaged.", why="Its digest differs.")
    return observation


def path_of(folder: Path, name: str) -> Path:
    """``<folder>/ab/abcdef….safetensors``."""
    return folder / name[:2] / f"{name}.safetensors"
