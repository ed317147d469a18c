"""Any model can grow: each kind of host takes a seed through its whole life, and predicts the same once exported."""

from __future__ import annotations

import json

import pytest
import torch

from tests.unit.attaching import Loop, PlainCNN, SmallGPT, SmallViT, UNet, digits, mlp, pixels, sequence_loss, text

LIFE = {"GERMINATED", "TRAINING", "BLENDING", "SHADOWING", "PROBATIONARY", "FOSSILIZED"}

HOSTS = {
    "a plain CNN": lambda: Loop(PlainCNN(), digits(), ["conv1", "conv2"]),
    "an MLP": lambda: Loop(mlp(), digits(), {"2": "vector", "4": "vector"}),
    "a small ViT": lambda: Loop(
        SmallViT(), digits(), {"encoder.layers.0": "sequence", "encoder.layers.1": "sequence"}, rate=5e-3, epochs=14
    ),
    "a U-Net": lambda: Loop(UNet(), pixels(), ["down1", "down2"]),
    "a GPT-like one": lambda: Loop(SmallGPT(), text(), ["h.0", "h.1"], loss=sequence_loss),
}


@pytest.fixture(autouse=True)
def same_draws_and_one_way_of_adding(one_thread):
    # Off, nn.MultiheadAttention has one way of adding in training and prediction; the export takes that one.
    torch.backends.mha.set_fastpath_enabled(False)
    torch.manual_seed(0)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.parametrize("host", HOSTS)
def test_a_seed_lives_its_whole_life_in_it_and_the_export_predicts_identically(host, tmp_path):
    loop = HOSTS[host]()
    born = sum(parameter.numel() for parameter in loop.model.parameters())
    reports = loop.until("FOSSILIZED")
    assert loop.stages() >= LIFE, [str(report) for report in reports]
    assert loop.grower.garden.checks > 0
    assert loop.grower.garden.violations == 0
    assert sum(parameter.numel() for parameter in loop.model.parameters()) > born

    loop.grower.export(tmp_path)
    about = json.loads((tmp_path / "model.json").read_text())
    assert about["blocks"]
    batch = about["input"]["shape"][0]
    sample = loop.data[0][: 5 if batch == "batch" else batch]
    with torch.no_grad():
        expected = loop.model.eval()(sample)
    loop.grower.close()
    with torch.no_grad():
        assert torch.equal(loop.model(sample), expected)
        assert torch.equal(torch.export.load(tmp_path / "model.pt2").module()(sample), expected)
