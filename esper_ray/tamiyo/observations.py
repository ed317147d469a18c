"""Where observations are kept for Simic: one file each, under the name of its content.

A record on the bus names its observation by digest. The files are written by a thread, after the decision has left, so
that no boundary waits for them; all of a run's are there before its end is told. What a kill takes is noticed by its
digest, and that run is not learned from.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
from pathlib import Path

import numpy as np
from safetensors.numpy import load, save

from esper_ray.errors import CorruptArtifact
from esper_ray.tamiyo.graph import Observation, observation_digest

log = logging.getLogger(__name__)


def write(folder: Path, observation: Observation) -> str:
    """Keep an observation; returns its digest. Writing the same one twice changes nothing."""
    name = observation_digest(observation)
    file = path_of(folder, name)
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        beside = file.with_suffix(f".{os.getpid()}")
        beside.write_bytes(save({key: np.ascontiguousarray(array) for key, array in observation.items()}))
        beside.replace(file)
    return name


class Writer:
    """Writes observations one after another in a thread of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._queue: queue.SimpleQueue[Observation | threading.Event] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="tamiyo-observations", daemon=True).start()

    def put(self, observation: Observation) -> None:
        """Keep it soon; returns at once."""
        self._queue.put(observation)

    def flush(self, timeout: float = 10.0) -> bool:
        """Wait until all that was put is written; whether it is."""
        done = threading.Event()
        self._queue.put(done)
        return done.wait(timeout)

    def _run(self) -> None:
        while True:
            item = self._queue.get()
            if isinstance(item, threading.Event):
                item.set()
                continue
            try:
                write(self._folder, item)
            except OSError as fault:
                # A full disk must not end the thread: the gap is noticed when the run is learned from.
                log.warning("an observation could not be written: %s", fault)


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
