"""Other people's reinforcement learning under our settings, one script each; none of them imports esper_ray.

They run under the interpreter that has them: RLlib pins a gymnasium of its own.
"""
