"""`transformer-lite`: a small causal transformer that predicts the next token; a slot behind each block.

Shapes: tokens [N, T]; between the blocks [N, T, D]; logits [N, T, classes]. Pre-norm blocks as in Radford et al. 2019
(GPT-2), after Vaswani et al. 2017, arXiv:1706.03762.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

HEAD_WIDTH = 16


class CausalAttention(nn.Module):
    """Each position attends to itself and to those before it: [N, T, D] -> [N, T, D].

    Written as two matrix products, so that what it costs is seen by PyTorch's FLOP counter on every device.
    """

    def __init__(self, width: int, context: int) -> None:
        super().__init__()
        self.heads = max(1, width // HEAD_WIDTH)
        self.project = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.register_buffer("later", torch.ones(context, context, dtype=torch.bool).triu(1), persistent=False)

    def forward(self, h: Tensor) -> Tensor:
        n, t, d = h.shape
        q, k, v = self.project(h).view(n, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1) / math.sqrt(d // self.heads)
        scores = scores.masked_fill(self.get_buffer("later")[:t, :t], -math.inf)
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(n, t, d)
        out: Tensor = self.out(mixed)
        return out


class Block(nn.Module):
    """``h + attention(norm(h))``, then ``h + mlp(norm(h))``, the MLP as wide as the block."""

    def __init__(self, width: int, context: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), CausalAttention(width, context)
        self.norm2, self.widen, self.narrow = nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, h: Tensor) -> Tensor:
        h = h + self.attention(self.norm1(h))
        out: Tensor = h + self.narrow(F.gelu(self.widen(self.norm2(h))))
        return out


class TransformerLite(nn.Module):
    """Two blocks between an embedding and a linear head. Slots: the outputs of ``block1`` and ``block2``."""

    slots = ("block1", "block2")

    def __init__(self, *, classes: int, context: int, width: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(classes, width), nn.Embedding(context, width)
        self.block1, self.block2 = Block(width, context), Block(width, context)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)
        for embedding in (self.tokens, self.places):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [N, T, classes] for the token after each position."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        h = self.tokens(tokens) + self.places(places)
        logits: Tensor = self.head(self.norm(self.block2(self.block1(h))))
        return logits
