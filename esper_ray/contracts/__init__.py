"""Leyline: what the processes say to one another, and nothing that can say it wrongly."""
