"""Makes the environment of this room known to gymnasium, which has no entry points for that since its version 1.0.

It is called when `esper_ray.simic` is imported; ``gymnasium.make("esper_ray.simic:esper_ray/Morphogenesis-v0")`` does
that by itself. The environment, and torch with it, is loaded when one is made.
"""

from __future__ import annotations

MORPHOGENESIS = "esper_ray/Morphogenesis-v0"


def register() -> None:
    """Register what is not registered yet."""
    from gymnasium.envs import registration

    if MORPHOGENESIS not in registration.registry:
        registration.register(
            id=MORPHOGENESIS,
            entry_point="esper_ray.simic.env:Morphogenesis",
            kwargs={"illegal": "no_op"},
            order_enforce=True,
        )
