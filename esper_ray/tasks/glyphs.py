"""The `glyphs` data set: characters drawn from the fonts that matplotlib ships, distorted, cluttered and noisy.

Nothing is downloaded. A sample is a pure function of (data seed, split, index block, difficulty) and of the fonts;
the drawn set is cached under a name that contains all of these.
"""

from __future__ import annotations

import math
import string
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import load_file, save
from torch import Tensor
from torch.nn import functional as F

from esper_ray.reliability import atomic
from esper_ray.reliability.ids import derive_seed, digest

SIZE = 24
CANVAS = 56
# Capitals without those that only size tells from a digit, and the small letters whose shape is their own.
CLASSES = string.digits + "".join(sorted(set(string.ascii_uppercase) - set("OI"))) + "abdefghnqrt"
FONT_PREFIXES = ("DejaVuSans", "DejaVuSerif", "STIXGeneral", "cmr10", "cmss10", "cmtt10", "cmb10")
_BLOCK = 2000
_VERSION = 1


def font_files() -> list[Path]:
    """The usable fonts of the installed matplotlib, in a fixed order."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return sorted(
        file
        for file in folder.glob("*.ttf")
        if file.name.startswith(FONT_PREFIXES) and not file.stem.endswith("Display")
    )


def draw_templates() -> Tensor:
    """Each class in each font, centred: [fonts, classes, CANVAS, CANVAS] floats in 0..1."""
    rows = []
    for file in font_files():
        font = ImageFont.truetype(str(file), 40)
        for character in CLASSES:
            image = Image.new("L", (CANVAS, CANVAS))
            ImageDraw.Draw(image).text((CANVAS / 2, CANVAS / 2), character, fill=255, font=font, anchor="mm")
            rows.append(np.asarray(image, dtype=np.float32) / 255.0)
    return torch.from_numpy(np.stack(rows)).view(-1, len(CLASSES), CANVAS, CANVAS)


def load_split(folder: Path, split: str, samples: int, *, difficulty: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images [N, 1, SIZE, SIZE] in uint8 and labels [N], from the cache or drawn now."""
    fonts = digest(b"".join(file.read_bytes() for file in font_files()))[:8]
    name = f"glyphs-v{_VERSION}-{split}-{samples}-{difficulty:g}-{seed}-{fonts}.safetensors"
    file = folder / name
    if not file.exists():
        images, labels = _draw_split(split, samples, difficulty, seed)
        atomic.write_bytes(file, save({"images": images, "labels": labels}))
    data = load_file(file)
    return data["images"], data["labels"]


def _draw_split(split: str, samples: int, difficulty: float, seed: int) -> tuple[Tensor, Tensor]:
    templates = draw_templates()
    blocks = [
        draw_block(templates, derive_seed(seed, "glyphs", split, start), min(_BLOCK, samples - start), difficulty)
        for start in range(0, samples, _BLOCK)
    ]
    return torch.cat([images for images, _ in blocks]), torch.cat([labels for _, labels in blocks])


def draw_block(templates: Tensor, seed: int, count: int, difficulty: float) -> tuple[Tensor, Tensor]:
    """``count`` samples: a distorted glyph, pieces of two others at the rim, uneven light, blur, noise.

    ``templates`` [fonts, classes, CANVAS, CANVAS] may be a part of `draw_templates`; labels are numbers in it.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(templates.shape[1], (count,), generator=generator)
    image = _distorted(templates, labels, generator, difficulty, shift=0.12 * difficulty)
    for _ in range(2):
        others = torch.randint(templates.shape[1], (count,), generator=generator)
        clutter = _distorted(templates, others, generator, difficulty, shift=0.0, rim=True)
        strength = torch.rand(count, 1, 1, 1, generator=generator) * min(1.0, 0.7 * difficulty)
        image = torch.maximum(image, clutter * strength)
    contrast = 1.0 - 0.5 * min(difficulty, 1.5) * torch.rand(count, 1, 1, 1, generator=generator)
    slope = torch.randn(count, 2, 1, 1, generator=generator) * 0.08 * difficulty
    ramp = torch.linspace(-1, 1, SIZE)
    light = slope[:, :1] * ramp.view(1, 1, 1, -1) + slope[:, 1:] * ramp.view(1, 1, -1, 1)
    noise = torch.randn(image.shape, generator=generator) * 0.07 * difficulty
    image = 0.15 + 0.7 * image * contrast + light + noise
    return (image.clamp(0, 1) * 255).round().to(torch.uint8), labels


def _distorted(
    templates: Tensor, labels: Tensor, generator: torch.Generator, difficulty: float, *, shift: float, rim: bool = False
) -> Tensor:
    """The templates of ``labels`` in random fonts under random affine maps: [N, 1, SIZE, SIZE]."""
    count = len(labels)
    fonts = torch.randint(len(templates), (count,), generator=generator)
    draws = torch.rand(count, 6, generator=generator) * 2 - 1
    angle = draws[:, 0] * math.radians(22) * difficulty
    scale = 1.0 / (0.95 + 0.25 * min(difficulty, 1.5) * draws[:, 1])
    shear, stretch = draws[:, 2] * 0.3 * difficulty, 1.0 + draws[:, 3] * 0.25 * min(difficulty, 1.5)
    if rim:
        direction = draws[:, 4] * math.pi
        offset = torch.stack([direction.cos(), direction.sin()], 1) * (0.75 + 0.1 * draws[:, 5:6])
    else:
        offset = draws[:, 4:6] * shift * 2
    cosine, sine = angle.cos() * scale, angle.sin() * scale
    rows = [
        torch.stack([cosine * stretch, -sine + shear, offset[:, 0]], 1),
        torch.stack([sine, cosine, offset[:, 1]], 1),
    ]
    theta = torch.stack(rows, 1)
    # Drawn at twice the size and averaged down, so that thin strokes survive.
    grid = F.affine_grid(theta, [count, 1, 2 * SIZE, 2 * SIZE], align_corners=False)
    return F.avg_pool2d(F.grid_sample(templates[fonts, labels].unsqueeze(1), grid, align_corners=False), 2)
