"""Simic: learns to decide. Its episodes are short training runs, or the decisions that runs have recorded."""

from esper_ray.simic.registration import register

register()
