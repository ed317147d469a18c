"""The bearer token of an installation; light, for the command line prints it."""

from __future__ import annotations

import secrets
from pathlib import Path

from esper_ray.reliability import atomic


def load_token(home: Path) -> str:
    """The bearer token of this installation, made on first use and readable by its owner only."""
    path = home / "keys" / "token"
    if not path.exists():
        atomic.write_text(path, secrets.token_urlsafe(24) + "\n", mode=0o600)
    return path.read_text().strip()
