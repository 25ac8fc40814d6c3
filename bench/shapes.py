"""Layer shapes of real models: what the benchmarks run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Linear:
    """A linear layer by its place in a decoder block: [in_features] -> [out_features]."""

    model: str
    place: str
    in_features: int
    out_features: int


LINEARS = (
    Linear(model="SmolLM2-135M", place="qkv", in_features=576, out_features=960),
    Linear(model="SmolLM2-135M", place="gate_up", in_features=576, out_features=3072),
    Linear(model="SmolLM2-135M", place="down", in_features=1536, out_features=576),
    Linear(model="LLaMA-2-7B", place="o", in_features=4096, out_features=4096),
    Linear(model="LLaMA-2-7B", place="down", in_features=11008, out_features=4096),
)

#: Tokens in a call: one of decoding, a small batch, a prompt.
TOKENS = (1, 16, 512)
