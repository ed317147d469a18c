"""Where observations are kept for Simic: one file each, under the name of its content.

A record on the bus names its observation by digest. The files are written by a thread, after the decision has left, so
that no boundary waits for them; all of a run's are there before its end is told. What a kill takes is noticed by its
digest, and that run is not learned from.
"""

from __future__ import annotations

import logging
import os
import queue
import sqlite3
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load, save

from esper_ray.errors import CorruptArtifact, EsperError
from esper_ray.tamiyo.graph import Observation, observation_digest

log = logging.getLogger(__name__)
REST_SECONDS = 0.02


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


class Aftermath:
    """What is left to do when a decision was given, in a thread of its own: keep observations, tell who waits for it.

    It rests a moment before it begins, so that the answer has left the process: it is one of few processors that the
    two would fight for.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._queue: queue.SimpleQueue[_Left | threading.Event] = queue.SimpleQueue()
        self._hurry = threading.Event()
        threading.Thread(target=self._run, name="tamiyo-aftermath", daemon=True).start()

    def put(self, observations: Sequence[Observation], then: Callable[[], None]) -> None:
        """Keep the observations soon, and call ``then`` when they are there; returns at once."""
        self._queue.put(_Left(tuple(observations), then))

    def flush(self, timeout: float = 10.0) -> bool:
        """Wait until all that was put is done; whether it is."""
        done = threading.Event()
        self._hurry.set()
        self._queue.put(done)
        try:
            return done.wait(timeout)
        finally:
            self._hurry.clear()

    def _run(self) -> None:
        while True:
            item = self._queue.get()
            if isinstance(item, threading.Event):
                item.set()
                continue
            self._hurry.wait(REST_SECONDS)
            # A full disk must not end the thread. What is missing then is noticed where it is looked for: a run without
            # its observations is not learned from, and a report is made again from the states when Tamiyo comes back.
            try:
                for observation in item.observations:
                    write(self._folder, observation)
                item.then()
            except (OSError, sqlite3.Error, EsperError) as fault:
                log.warning("what is left of a decision could not be done: %s", fault)


@dataclass(frozen=True, slots=True)
class _Left:
    observations: tuple[Observation, ...]
    then: Callable[[], None]


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
