"""Layer shapes of real models: what the benchmarks run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Linear:
    """A linear layer by its place in a decoder block: [in_features] -> [out_features].

    q, k and v are one product, and so are gate and up: they share their input.
    """

    model: str
    place: str
    in_features: int
    out_features: int

    def __str__(self) -> str:
        return f"{self.model} {self.place} {self.in_features}->{self.out_features}"


def _block(model: str, *, hidden: int, keys: int, intermediate: int) -> tuple[Linear, ...]:
    """The linear layers of a decoder block with `keys` channels of keys and as many of values."""
    sizes = {
        "qkv": (hidden, hidden + 2 * keys),
        "o": (hidden, hidden),
        "gate_up": (hidden, 2 * intermediate),
        "down": (intermediate, hidden),
    }
    return tuple(
        Linear(model=model, place=place, in_features=k, out_features=n)
        for place, (k, n) in sizes.items()
    )


LINEARS = (
    *_block("SmolLM2-135M", hidden=576, keys=192, intermediate=1536),
    *_block("Llama-7B", hidden=4096, keys=4096, intermediate=11008),
    *_block("Llama-8B", hidden=4096, keys=1024, intermediate=14336),
    *_block("Qwen2.5-7B", hidden=3584, keys=512, intermediate=18944),
)

#: Tokens in a call: decoding alone and in batches, prompts.
TOKENS = (1, 16, 64, 512, 4096)
#: A shape whose rate must not fall from any batch to the next larger one, and the batches.
SMOOTH, SMOOTH_TOKENS = "Llama-7B o", (1, 2, 4, 8, 16, 32, 64, 512, 4096)

#: What a quick run times: one small layer, the two of Llama-7B that figures are stated for.
QUICK = ("SmolLM2-135M gate_up", "Llama-7B o", "Llama-7B down")
QUICK_TOKENS = (1, 8, 32, 512)


def tokens_for(linear: Linear, quick: bool) -> tuple[int, ...]:
    """Numbers of tokens to time a shape with."""
    if quick:
        return QUICK_TOKENS
    return SMOOTH_TOKENS if str(linear).startswith(SMOOTH) else TOKENS
