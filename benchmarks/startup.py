"""How long until something happens: from the command to the first training step, on a system that is not up yet.

- ``first_step_s``: `python examples/demo.py --no-compare` in a new home folder, to the end of its first step. The data
  set is drawn and the kernels are made in this time or beside it.
- ``idle_rss_mb``: memory of our actors' processes while nothing trains (proportional shares, so that shared pages
  count once); ``idle_ray_mb``: Ray's own processes, for comparison.
- ``install_s``: only with --install: `pip install` of the project into a new virtual environment.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks import common
from benchmarks.common import Bar
from esper_ray import config as configuration
from esper_ray.runtime import connect

BARS = (Bar("first_step_s", 30.0),)
ROOT = Path(__file__).resolve().parent.parent
GIVE_UP_SECONDS = 180


def first_step(home: str) -> float:
    """Seconds from the command to the end of the first training step."""
    start = time.time()
    command = [sys.executable, str(ROOT / "examples" / "demo.py"), "--no-compare"]
    command += ["--set", "ray.namespace=benchmark", "--set", "nissa.port=0"]
    environment = {**os.environ, "ESPER_HOME": home}
    demo = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )
    try:
        while time.time() - start < GIVE_UP_SECONDS and demo.poll() is None:
            for file in Path(home).glob("runs/*/metrics.jsonl"):
                line = file.read_text().partition("\n")
                if line[1]:
                    row = json.loads(line[0])
                    # The file was written at the epoch's end: go back by what the epoch took, less one step.
                    return file.stat().st_mtime - start - row["seconds"] + row["step_ms"] / 1e3
            time.sleep(0.05)
        message = demo.stderr.read().decode()[-1000:] if demo.poll() is not None and demo.stderr else "it took too long"
        raise SystemExit(f"the demo did not reach its first epoch: {message}")
    finally:
        demo.send_signal(signal.SIGINT)
        demo.wait(120)


def idle_memory(home: str) -> dict[str, float]:
    """MiB of the actors and of Ray while the system is up and idle."""
    config = configuration.load(None, [f"home={home}", "ray.namespace=benchmark", "nissa.port=0"])
    with connect(config, say=common.console.print) as session:
        status = session.up()
        actors = {row["pid"] for row in status["actors"].values()}
        time.sleep(3.0)
        ours = sum(psutil.Process(pid).memory_full_info().pss for pid in actors)
        rays = sum(
            process.memory_full_info().pss
            for process in psutil.process_iter(["cmdline"])
            if any("ray" in part for part in process.info["cmdline"] or ())
            and process.pid not in actors | {os.getpid()}
        )
    return {"idle_rss_mb": ours / 2**20, "idle_ray_mb": rays / 2**20}


def install() -> float:
    """Seconds of a pip install into a new environment, downloads included."""
    with tempfile.TemporaryDirectory(prefix="esper-") as folder:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        start = time.perf_counter()
        command = [f"{folder}/bin/pip", "install", "--quiet", "-c", str(ROOT / "constraints.txt"), str(ROOT)]
        subprocess.run(command, check=True)
        return time.perf_counter() - start


def measure(*, with_install: bool) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="esper-") as home:
        figures["first_step_s"] = first_step(home)
        figures |= idle_memory(home)
    if with_install:
        figures["install_s"] = install()
    return figures


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--install", action="store_true", help="measure the installation as well (minutes, network)")
    given = parser.parse_args()
    common.run("startup", BARS, lambda: measure(with_install=given.install), given.json)


if __name__ == "__main__":
    main()
