"""Named points at which a process can be made to kill itself, so that a test knows where it died.

The whole table is here. `passing` does nothing unless this process was armed: by `arm`, or by the environment variable
``ESPER_FAILPOINT``, ``NAME`` or ``NAME:N`` for the N-th time that the point is passed. The kill is SIGKILL: nothing is
flushed and no handler runs, as after the kernel's out-of-memory killer.
"""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter
from collections.abc import Mapping

from esper_ray.errors import ConfigError

ENVIRONMENT = "ESPER_FAILPOINT"

# name -> what has happened when it is passed
POINTS: Mapping[str, str] = {
    # Tolaria: the run
    "run.restored": "the checkpoint is loaded, or there was none",
    "run.rewound": "rows of epochs that will be done again are removed",
    "run.opened": "Tamiyo knows the run",
    "step.begun": "seeds grafted and ramps moved, nothing computed",
    "step.backward": "the host's gradients are there",
    "step.shadow": "the isolated seeds' gradients are there",
    "step.done": "the optimizer made its step",
    "epoch.trained": "the last step before a boundary is done",
    "epoch.measured": "the validation loss is known",
    "epoch.judged": "the gates moved the seeds on",
    "epoch.decided": "the boundary is over",
    "rollback.recorded": "a rollback is written down, nothing was changed",
    "rollback.opened": "the run is back on its new branch, its rows are not",
    "rollback.rewound": "its rows are back as well, its checkpoint is not written",
    "epoch.written": "the epoch's rows are written",
    "epoch.done": "the checkpoint is handed to its thread",
    "end.closed": "Tamiyo closed the run",
    "end.tested": "the test split was read",
    "end.exported": "the model is exported",
    "end.written": "the result is written",
    # Tolaria: the boundary
    "boundary.assembled": "the state is sealed, nobody was asked",
    "boundary.answered": "the commands are here",
    "boundary.recorded": "the decision is in the run's journal, nothing applied",
    "boundary.applied": "the commands are carried out",
    # Tolaria: what a run leaves behind
    "recorder.manifest": "the manifest is written",
    "recorder.decision": "the decision is about to be written down",
    "recorder.graft": "the step of a graft is about to be written down",
    "recorder.row": "the epoch's row is written, its events are not",
    "recorder.events": "its events are written, nothing was sent",
    "recorder.told": "its telemetry is sent",
    "recorder.mirrored": "state and commands are on the bus",
    "checkpoint.begun": "the thread took the checkpoint up",
    "checkpoint.tensors": "the tensors are on disk, without a manifest",
    "checkpoint.manifest": "the manifest is on disk",
    "checkpoint.pruning": "an old checkpoint has lost its manifest and still has its tensors",
    "atomic.written": "a file is whole under its temporary name",
    "atomic.renamed": "it has its own name, the folder is not synced",
    # Kasmina
    "garden.asked": "a kernel was asked for",
    "garden.born": "a newborn passed its gate and is not grafted",
    "garden.grafted": "it is in its slot and in the optimizer",
    "garden.entered": "a slot changed its stage",
    "garden.culled": "a seed left its slot",
    "garden.fossilised": "a seed is part of the host",
    # Journals, Tamiyo's and the run's own
    "journal.inserted": "an entry is in, not committed",
    "journal.committed": "it is committed, and its writer does not know yet",
    # Tamiyo
    "tamiyo.opened": "the opening is in her journal",
    "tamiyo.thought": "she decided, and wrote nothing down",
    "tamiyo.decided": "the decision is in her journal, its records are not sent",
    "tamiyo.told": "its records are sent",
    "tamiyo.report": "a field report is in her journal and was not sent",
    "tamiyo.reported": "it was sent",
    "tamiyo.closed": "the run's openings are forgotten",
}

_lock = threading.Lock()
_armed: tuple[str, int] | None = None
_passed: Counter[str] | None = None


def passing(name: str) -> None:
    """Say that the point is passed; the process dies here if it was armed for this."""
    if _passed is not None:
        _count(name)


def arm(name: str, nth: int = 1) -> None:
    """Kill this process when ``name`` is passed for the ``nth`` time from now on.

    Raises:
        ConfigError: there is no such point.
    """
    global _armed
    if name not in POINTS or nth < 1:
        raise ConfigError(
            f"{name}:{nth} is no failpoint.",
            why=f"The points are {', '.join(POINTS)}; the count begins at 1.",
            remedy=f"Correct {ENVIRONMENT}, or unset it.",
        )
    watch()
    _armed = (name, nth)


def watch() -> Counter[str]:
    """Count passings from now on; the counter goes on counting."""
    global _armed, _passed
    _armed, _passed = None, Counter()
    return _passed


def _count(name: str) -> None:
    with _lock:
        assert name in POINTS, f"{name} is not in the table of failpoints"
        assert _passed is not None
        _passed[name] += 1
        if _armed == (name, _passed[name]):
            os.kill(os.getpid(), signal.SIGKILL)


def arm_from(text: str) -> None:
    """Arm from ``NAME`` or ``NAME:N``.

    Raises:
        ConfigError: there is no such point.
    """
    name, _, nth = text.partition(":")
    arm(name, int(nth) if nth.isdigit() else 0 if nth else 1)


if os.environ.get(ENVIRONMENT):
    arm_from(os.environ[ENVIRONMENT])
