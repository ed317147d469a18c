"""Actors rank themselves, so that what the training waits for comes before what works in the background."""

from __future__ import annotations

import subprocess
import sys

import pytest

from esper_ray.actors.resources import table
from esper_ray.config import Config

_ASK = """
import os, threading
from esper_ray.actors.resources import take_priority
threading.Thread(target=threading.Event().wait, daemon=True).start()
had = take_priority("school")
print(had, *{os.getpriority(os.PRIO_PROCESS, int(each)) for each in os.listdir("/proc/self/task")})
"""


def test_tamiyo_comes_before_the_training_and_the_background_comes_last() -> None:
    rank = {name: spec.niceness for name, spec in table(Config()).items()}
    assert rank["tamiyo"] < rank["tolaria"] < rank["nissa"] <= rank["tezzeret"]


@pytest.mark.skipif(sys.platform != "linux", reason="niceness of single threads is Linux's")
def test_all_threads_of_a_process_take_its_rank() -> None:
    """Those that were there before too: Ray's own threads are."""
    said = subprocess.run([sys.executable, "-c", _ASK], capture_output=True, text=True, check=True).stdout
    assert said.split() == ["15", "15"]
