"""Coverage-guided fuzzing of every decoder, by hand; it needs atheris, which is no dependency of ours:

    python -m venv build/fuzz && build/fuzz/bin/pip install atheris -e '.[dev]'
    build/fuzz/bin/python -m tests.fuzz_contracts -max_total_time=300

The first byte of an input chooses the decoder. What is neither a message nor refused with a typed error ends the run,
and atheris writes the input down.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["esper_ray.contracts"]):
    from tests.unit.test_contracts_fuzz import DECODERS, SEEDS, outcome

_NAMES = sorted(DECODERS)


def one(data: bytes) -> None:
    if data:
        assert outcome(DECODERS[_NAMES[data[0] % len(_NAMES)]], data[1:])


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="esper-") as corpus:
        for number, name in enumerate(_NAMES):
            for place, seed in enumerate(SEEDS[name][:50]):
                (Path(corpus) / f"{number}-{place}").write_bytes(bytes([number]) + seed)
        atheris.Setup([*sys.argv, corpus], one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
