"""Makes the environments of this room known to gymnasium; importing nothing but gymnasium's registry.

It is called when `esper_ray.simic` is imported, and by gymnasium itself through the entry point ``gymnasium.envs``.
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
