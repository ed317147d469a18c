"""Three hosts that were trained on something, and what they meet then.

| task | host | trained on | meets |
|---|---|---|---|
| fonts | resnet-lite, width 8 | characters in the DejaVu fonts | the same ones in STIX and Computer Modern |
| classes | resnet-lite, width 8 | half of the characters | the other half, in the same fonts |
| text | transformer-lite, width 64 | Python source code | English prose: the texts of Python's ``help()`` |
"""

from __future__ import annotations

import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from esper_ray.reliability.ids import derive_seed
from esper_ray.tasks import glyphs, pycode
from esper_ray.tasks.resnet import ResNetLite
from esper_ray.tasks.transformer import TransformerLite

DIFFICULTY, CONTEXT = 0.75, 64
_MEAN, _DEVIATION = 0.27, 0.21
Pair = tuple[Tensor, Tensor]
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, slots=True)
class Task:
    """A host and two worlds.

    Args:
        adapted: the layers that adapters go beside.
        slots: where seeds may grow.
        host_rate, host_steps: how the host was trained on the old data, batch 64.
        sizes: samples of the splits, for each of both worlds.
    """

    name: str
    host: Callable[[], nn.Module]
    read: Callable[[str, str, int], Pair]
    adapted: tuple[str, ...]
    slots: tuple[str, ...]
    host_rate: float
    host_steps: int
    sizes: dict[str, dict[str, int]]

    def data(self, folder: Path) -> dict[str, dict[str, Pair]]:
        """``[world][split]`` for old and new; drawn once, then kept in ``folder``."""
        file = folder / f"{self.name}.safetensors"
        if not file.exists():
            drawn = {
                f"{world}.{split}.{kind}": tensor
                for world in ("old", "new")
                for split in SPLITS
                for kind, tensor in zip(("inputs", "targets"), self._split(world, split), strict=True)
            }
            folder.mkdir(parents=True, exist_ok=True)
            save_file(drawn, file)
        kept = load_file(file)
        return {
            world: {split: (kept[f"{world}.{split}.inputs"], kept[f"{world}.{split}.targets"]) for split in SPLITS}
            for world in ("old", "new")
        }

    def _split(self, world: str, split: str) -> Pair:
        inputs, targets = self.read(world, split, self.sizes[world][split])
        return inputs.contiguous(), targets.contiguous()


def _characters(fonts: Sequence[int], classes: Sequence[int], split: str, samples: int, purpose: str) -> Pair:
    """Characters of these classes in these fonts; labels are of all classes."""
    templates = glyphs.draw_templates()[list(fonts)][:, list(classes)]
    seed = derive_seed(0, "newdata", purpose, split)
    images, labels = glyphs.draw_block(templates, seed, samples, DIFFICULTY)
    return (images.float() / 255 - _MEAN) / _DEVIATION, torch.tensor(classes)[labels]


def _fonts(world: str, split: str, samples: int) -> Pair:
    deja = [number for number, file in enumerate(glyphs.font_files()) if file.stem.startswith("DejaVu")]
    others = [number for number in range(len(glyphs.font_files())) if number not in deja]
    everyone = range(len(glyphs.CLASSES))
    return _characters(deja if world == "old" else others, everyone, split, samples, f"fonts {world}")


def _classes(world: str, split: str, samples: int) -> Pair:
    half = range(0 if world == "old" else 1, len(glyphs.CLASSES), 2)
    return _characters(range(len(glyphs.font_files())), half, split, samples, f"classes {world}")


def _text(world: str, split: str, samples: int) -> Pair:
    """Windows of 64 bytes. The prose is cut in ten pieces one after the other, eight of them for training."""
    if world == "old":
        return pycode.load_split(split, samples, CONTEXT)
    prose = Path(sysconfig.get_paths()["stdlib"], "pydoc_data", "topics.py").read_bytes()
    data = np.frombuffer(prose, np.uint8)
    windows = np.lib.stride_tricks.sliding_window_view(data, CONTEXT + 1)[::CONTEXT]
    # A ruled line of asterisks is in the text several times.
    windows = windows[np.sort(np.unique(windows, axis=0, return_index=True)[1])]
    piece = np.arange(len(windows)) * 50 // len(windows) % 10
    chosen = windows[{"train": piece < 8, "validation": piece == 8, "test": piece == 9}[split]]
    order = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(derive_seed(0, "prose", split)))
    taken = torch.from_numpy(chosen.copy())[order[:samples]].long()
    return taken[:, :-1], taken[:, 1:]


def _resnet() -> nn.Module:
    return ResNetLite(channels=1, classes=len(glyphs.CLASSES), width=8)


def _transformer() -> nn.Module:
    return TransformerLite(classes=pycode.CLASSES, context=CONTEXT, width=64)


_IMAGES = {
    "old": {"train": 16_000, "validation": 1000, "test": 4000},
    "new": {"train": 2000, "validation": 1000, "test": 4000},
}
_STAGES = ("stage1", "stage2", "stage3")
_CONVOLUTIONS = tuple(f"{stage}.0" for stage in _STAGES)
_BLOCKS = ("block1", "block2")
_LINEARS = tuple(
    f"{block}.{layer}" for block in _BLOCKS for layer in ("attention.project", "attention.out", "widen", "narrow")
)
TASKS = {
    task.name: task
    for task in (
        Task("fonts", _resnet, _fonts, _CONVOLUTIONS, _STAGES, 1e-2, 1500, _IMAGES),
        Task("classes", _resnet, _classes, _CONVOLUTIONS, _STAGES, 1e-2, 1500, _IMAGES),
        Task(
            "text",
            _transformer,
            _text,
            _LINEARS,
            _BLOCKS,
            3e-3,
            1200,
            {
                "old": {"train": 16_000, "validation": 500, "test": 1000},
                "new": {"train": 2000, "validation": 500, "test": 1000},
            },
        ),
    )
}
