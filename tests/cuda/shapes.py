"""The sizes that real models have: what the planners and the budgets are proved for."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Model:
    """The sizes of a decoder's linear layers."""

    name: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int

    def linears(self) -> dict[str, tuple[int, int]]:
        """Output and input features of every linear layer, also of those that may be joined."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q": (q, self.hidden),
            "kv": (kv, self.hidden),
            "qkv": (q + 2 * kv, self.hidden),
            "o": (self.hidden, q),
            "gate_up": (self.intermediate, self.hidden),
            "gate_up_joined": (2 * self.intermediate, self.hidden),
            "down": (self.hidden, self.intermediate),
        }


MODELS = (
    Model("Llama-2-7B", 4096, 11008, 32, 32, 128),
    Model("Llama-2-13B", 5120, 13824, 40, 40, 128),
    Model("Llama-2-70B", 8192, 28672, 64, 8, 128),
    Model("Llama-3-8B", 4096, 14336, 32, 8, 128),
    Model("Llama-3-70B", 8192, 28672, 64, 8, 128),
    Model("Qwen2.5-0.5B", 896, 4864, 14, 2, 64),
    Model("Qwen2.5-1.5B", 1536, 8960, 12, 2, 128),
    Model("Qwen2.5-3B", 2048, 11008, 16, 2, 128),
    Model("Qwen2.5-7B", 3584, 18944, 28, 4, 128),
    Model("Qwen2.5-14B", 5120, 13824, 40, 8, 128),
    Model("Qwen2.5-32B", 5120, 27648, 40, 8, 128),
    Model("Qwen2.5-72B", 8192, 29568, 64, 8, 128),
    Model("Mistral-7B", 4096, 14336, 32, 8, 128),
    Model("SmolLM2-135M", 576, 1536, 9, 3, 64),
    Model("SmolLM2-360M", 960, 2560, 15, 5, 64),
    Model("SmolLM2-1.7B", 2048, 8192, 32, 32, 64),
)

# Output and input features of every GEMM.
LINEARS = sorted({shape for model in MODELS for shape in model.linears().values()})


def split(n: int) -> tuple[int, int]:
    """The sizes of the factors of an online transform (see flatquant.transforms.split)."""
    left = next(d for d in range(math.isqrt(n), 0, -1) if n % d == 0)
    return left, n // left


# (n1, n2) of every online transform with two factors; (heads, head_dim) where only the left one is
# there and mixes heads.
OTHERS = {3072, 9216}  # Llama-3.2-3B, Gemma-2-2B
CHANNELS = sorted(OTHERS | {k for model in MODELS for k in (model.hidden, model.intermediate)})
FACTORS = [split(n) for n in CHANNELS]
HEADS = sorted({(model.heads, model.head_dim) for model in MODELS})

# Rows: every decode batch and beyond, then a ladder, with the neighbours of multiples of tiles.
ROWS: NDArray[np.int64] = np.unique(
    np.clip(
        [
            *range(1, 301),
            *(
                base + step
                for base in (320, 384, 512, 640, 768, 1024, 1536, 2048, 3072, 4096, 8192, 16384)
                for step in (-1, 0, 1)
            ),
        ],
        1,
        16384,
    )
).astype(np.int64)
