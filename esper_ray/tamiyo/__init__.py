"""Tamiyo: decides. It sees system states, answers with commands, and reports what its decisions led to."""
