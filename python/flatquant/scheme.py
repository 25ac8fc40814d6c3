"""Which tensors are quantized to how many bits: the one thing every other part agrees on."""

from __future__ import annotations

import re
from dataclasses import dataclass

OFF = 16
"""Bit width that means "not quantized"."""

_MAIN = re.compile(r"(?:W(?P<w>\d+))?(?:A(?P<a>\d+))?(?:KV(?P<kv>\d+)|K(?P<k>\d+)V(?P<v>\d+))?")
_GROUP = re.compile(r"g(?P<group>\d+)")
_HEAD = re.compile(r"head(?P<head>\d+)")


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """Bit widths and grids of weights, activations, keys and values; 16 bits means off.

    Weights are symmetric per output channel (or per group of input channels), activations
    per token and dynamic, keys and values asymmetric per token and head (docs/numerics.md).

    Attributes:
        w_bits: bits of the weights of the decoder's linears, 2..8 or 16.
        a_bits: bits of the inputs of those linears, 2..8 or 16.
        k_bits: bits of cached keys, 2..8 or 16.
        v_bits: bits of cached values, 2..8 or 16.
        a_symmetric: symmetric (default) or asymmetric activation grid.
        w_group: input channels that share one weight scale; None is the whole channel.
        head_bits: bits of the output head and its input, 8 or 16; a tied embedding shares them.

    Raises:
        ValueError: a width outside 2..8 and 16, or groups together with integer activations.
    """

    w_bits: int = OFF
    a_bits: int = OFF
    k_bits: int = OFF
    v_bits: int = OFF
    a_symmetric: bool = True
    w_group: int | None = None
    head_bits: int = OFF

    def __post_init__(self) -> None:
        for name in ("w_bits", "a_bits", "k_bits", "v_bits"):
            bits = getattr(self, name)
            if not isinstance(bits, int) or not (2 <= bits <= 8 or bits == OFF):
                raise ValueError(f"Scheme: {name}={bits!r} must be 2..8, or 16 for off")
        if self.head_bits not in (8, OFF):
            raise ValueError(f"Scheme: head_bits={self.head_bits!r} must be 8, or 16 for off")
        if self.w_group is not None:
            if self.w_group < 1:
                raise ValueError(f"Scheme: w_group={self.w_group} must be at least 1")
            if self.w_bits == OFF:
                raise ValueError(f"Scheme: w_group={self.w_group} needs w_bits below 16")
            if self.quantizes_activations:
                raise ValueError(
                    f"Scheme: w_group={self.w_group} with a_bits={self.a_bits}: the integer "
                    "GEMM has one weight scale per output channel; use a_bits=16 or no groups"
                )

    def check_width(self, channels: int) -> None:
        """Refuse a layer whose input channels the weight groups do not divide.

        Raises:
            ValueError: naming both numbers.
        """
        if self.w_group is not None and channels % self.w_group:
            raise ValueError(
                f"w_group={self.w_group} does not divide the layer's {channels} input channels"
            )

    @property
    def quantizes_weights(self) -> bool:
        """Whether the linears' weights are quantized."""
        return self.w_bits != OFF

    @property
    def quantizes_activations(self) -> bool:
        """Whether the linears' inputs are quantized."""
        return self.a_bits != OFF

    @property
    def quantizes_linears(self) -> bool:
        """Whether the linears change at all."""
        return self.quantizes_weights or self.quantizes_activations

    @property
    def quantizes_cache(self) -> bool:
        """Whether keys or values are quantized."""
        return self.k_bits != OFF or self.v_bits != OFF

    @classmethod
    def parse(cls, text: str | Scheme) -> Scheme:
        """Read "W4A4KV4", "W4A8KV4", "W4A16", "W3A16-g128", "KV4", "K4V2", "W4A4KV4-asym-head8".

        Raises:
            ValueError: the text is not of that form, or the scheme breaks a rule above.
        """
        if isinstance(text, Scheme):
            return text
        main, *options = str(text).split("-")
        match = _MAIN.fullmatch(main)
        if match is None or not main:
            raise ValueError(f"scheme {text!r}: expected a form like W4A4KV4, W3A16-g128 or KV4")
        bits = {name: int(value) for name, value in match.groupdict().items() if value}
        symmetric, group, head = True, None, OFF
        for option in options:
            if option == "asym":
                symmetric = False
            elif found := _GROUP.fullmatch(option):
                group = int(found["group"])
            elif found := _HEAD.fullmatch(option):
                head = int(found["head"])
            else:
                raise ValueError(
                    f"scheme {text!r}: unknown option {option!r}; known: asym, gN, head8"
                )
        return cls(
            w_bits=bits.get("w", OFF),
            a_bits=bits.get("a", OFF),
            k_bits=bits.get("k", bits.get("kv", OFF)),
            v_bits=bits.get("v", bits.get("kv", OFF)),
            a_symmetric=symmetric,
            w_group=group,
            head_bits=head,
        )

    def __str__(self) -> str:
        text = ""
        if self.quantizes_linears:
            text += f"W{self.w_bits}A{self.a_bits}"
        if self.quantizes_cache:
            same = self.k_bits == self.v_bits
            text += f"KV{self.k_bits}" if same else f"K{self.k_bits}V{self.v_bits}"
        text = text or "W16A16"
        if not self.a_symmetric:
            text += "-asym"
        if self.w_group is not None:
            text += f"-g{self.w_group}"
        if self.head_bits != OFF:
            text += f"-head{self.head_bits}"
        return text
