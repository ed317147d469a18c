"""A trained host meets new data, and training anew is not on offer: `python -m benchmarks.newdata --help`."""
