"""Which settings make growth pay: ablations at equal FLOPs, chosen on the validation split alone."""
