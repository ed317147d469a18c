"""A PyTorch model that grows while it trains, on Ray.

    import esper_ray

    config = esper_ray.load(settings=["run.epochs=12"])
    with esper_ray.connect(config) as session:
        session.up()
        run = session.submit(config)
        session.wait(run)

Names are loaded on first use, so that importing a light room loads neither torch nor ray.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from esper_ray.attaching import attach
    from esper_ray.config import Config, load
    from esper_ray.errors import EsperError
    from esper_ray.runtime import Session, connect

    __version__: str

_HOME_OF = {
    "attach": "esper_ray.attaching",
    "Config": "esper_ray.config",
    "load": "esper_ray.config",
    "EsperError": "esper_ray.errors",
    "Session": "esper_ray.runtime",
    "connect": "esper_ray.runtime",
}
__all__ = ["Config", "EsperError", "Session", "__version__", "attach", "build", "connect", "load"]


def build() -> str:
    """This code's identity: its version and the digest of its message schema. Processes of another one are refused."""
    from esper_ray.contracts.schema import schema_digest

    return f"{__getattr__('__version__')}+{schema_digest()[:12]}"


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("esper_ray")
    if name in _HOME_OF:
        return getattr(import_module(_HOME_OF[name]), name)
    raise AttributeError(f"module 'esper_ray' has no attribute {name!r}")
