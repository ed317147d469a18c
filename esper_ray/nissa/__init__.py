"""Nissa: sees. Metrics, events, alerts and the page, all folded from the records that came over the bus.

`core.Nissa` holds the parts together. The room knows messages, not the bus that brings them.
"""
