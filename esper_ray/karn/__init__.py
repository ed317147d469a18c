"""Karn: the catalogue of blueprints. `catalog` describes them without torch; `blueprints` builds them."""
