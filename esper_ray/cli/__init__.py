"""The `esper` command. Every fault a user can mend is one sentence and exit code 2; nothing else prints errors."""

from __future__ import annotations

import signal
import sys
from types import FrameType
from typing import NoReturn

from rich.console import Console
from rich.text import Text

from esper_ray.cli.app import app
from esper_ray.errors import EsperError

__all__ = ["app", "main"]


def main() -> None:
    """The entry point of the `esper` script."""
    signal.signal(signal.SIGTERM, _leave)
    try:
        app()
    except EsperError as error:
        fail(error)


def fail(error: EsperError) -> NoReturn:
    """Print the one sentence and leave."""
    Console(stderr=True, highlight=False).print(Text.assemble(("error: ", "red"), str(error)), soft_wrap=True)
    sys.exit(error.exit_code)


def _leave(number: int, _: FrameType | None) -> NoReturn:
    """End through the context managers, so that a cluster of ours is not left behind."""
    sys.exit(128 + number)
