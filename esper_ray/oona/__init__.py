"""Oona: the bus. Redis Streams with at-least-once delivery; senders never wait for it.

`bus` is the front door; `server` finds or runs the Redis. The room knows envelopes, not what is inside them.
"""
