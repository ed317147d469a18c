"""The settings of a run of a second or two that grows as soon as it may, for tests to add theirs to."""

SETTINGS = (
    "run.dataset=digits",
    "run.boundary_every=8",
    "run.host_width=4",
    "run.device=cpu",
    "seeds.shadow_share=1.0",
    "tamiyo.plateau_rate=10",
    "tamiyo.onset=0",
    "tamiyo.warmup_epochs=1",
)
