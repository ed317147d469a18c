"""A grown model as a product: an exported program that plain PyTorch loads, with nothing of ours in it.

Three files: ``model.pt2`` (`torch.export`, any batch size where the host's code allows it), ``model.safetensors`` (the
same weights by name), and ``model.json`` (what it is and how to load it).
"""

from __future__ import annotations

import contextlib
import io
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils._pytree import tree_leaves

from esper_ray.errors import KernelError
from esper_ray.kasmina.garden import GROWN, Garden, Grown
from esper_ray.kasmina.lifecycle import SETTLED
from esper_ray.reliability import atomic
from esper_ray.reliability.ids import digest

HOW = "torch.export.load('model.pt2').module()(inputs)"


def export_model(garden: Garden, sample: Tensor, folder: Path) -> dict[str, Any]:
    """Write the model as it predicts now: host, fossils, and what is still live at its present alpha.

    A host's own code may not let its batch be free; then the program takes N samples. Where torch.export cannot follow
    it at all, the weights are written without a program. ``model.json`` says which and why.

    Args:
        sample: inputs [N, ...] with N >= 2.

    Returns:
        What ``model.json`` says.

    Raises:
        KernelError: the exported program does not predict bit for bit what the model predicts.
    """
    model = garden.model
    training = [module for module in model.modules() if module.training]
    model.eval()
    with _registered(garden), _one_way_of_attention(), torch.no_grad(), warnings.catch_warnings():
        # torch warns about its own internals here; the check below is what counts.
        warnings.simplefilter("ignore")
        expected = model(sample)
        program, batch, trouble = _program(model, sample)
        # Copies: two names of one tensor are two entries of the file.
        weights = {name: value.detach().cpu().clone().contiguous() for name, value in model.state_dict().items()}
        buffer = io.BytesIO()
        identical = True
        if program is not None:
            torch.export.save(program, buffer)
            loaded = torch.export.load(io.BytesIO(buffer.getvalue())).module()
            identical = all(map(torch.equal, tree_leaves(loaded(sample)), tree_leaves(expected)))
    for module in training:
        module.training = True
    if not identical:
        raise KernelError(
            "The exported program predicts differently from the model.",
            why="torch.export changed the order of a computation.",
            remedy="Use the weights in the last checkpoint, and report this with the blueprints of the run.",
        )
    about = {
        "load": HOW if program is not None else f"weights only, for the host's own code: {trouble}",
        "input": {"shape": [batch, *sample.shape[1:]], "dtype": str(sample.dtype).removeprefix("torch.")},
        "parameters": sum(value.numel() for value in weights.values()),
        "blocks": [
            {
                "slot": garden.slots[seed.slot].info.name,
                "blueprint": seed.spec.blueprint,
                "blend_mode": seed.mode.name.lower(),
                "alpha": seed.alpha,
            }
            for seed in garden.seeds
            if seed.alpha > 0.0
        ],
        "torch": torch.__version__,
        "digest": digest(buffer.getvalue()),
    }
    if program is not None:
        atomic.write_bytes(folder / "model.pt2", buffer.getvalue())
    atomic.write_bytes(folder / "model.safetensors", save(weights))
    atomic.write_text(folder / "model.json", json.dumps(about, indent=1))
    return about


def _program(model: nn.Module, sample: Tensor) -> tuple[ExportedProgram | None, str | int, str]:
    """The program, the size of its batch ("batch" for any), and why there is none."""
    for size in ("batch", len(sample)):
        shapes = ({0: torch.export.Dim("batch")},) if size == "batch" else None
        try:
            return torch.export.export(model, (sample,), dynamic_shapes=shapes), size, ""
        except Exception as error:  # torch.export raises what it meets, of any kind
            trouble = " ".join(str(error).split())[:300]
    return None, "batch", trouble


@contextlib.contextmanager
def _one_way_of_attention() -> Iterator[None]:
    """Inside, nn.MultiheadAttention computes as it does in training, and not by its fused way that adds otherwise."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextlib.contextmanager
def _registered(garden: Garden) -> Iterator[None]:
    """Seeds that are live but no fossils yet count as parts of the model while it is exported."""
    live = [seed for seed in garden.seeds if seed.stage not in SETTLED and seed.alpha > 0.0]
    before = dict(garden.model.named_children()).get(GROWN)
    parts = Grown(dict(before.items()) if isinstance(before, nn.ModuleDict) else {})
    for seed in live:
        assert seed.branch is not None
        parts[garden.grown_name(garden.slots[seed.slot])] = seed.branch
    if live:
        garden.model.add_module(GROWN, parts)
    try:
        yield
    finally:
        if live and before is not None:
            garden.model.add_module(GROWN, before)
        elif live:
            delattr(garden.model, GROWN)
