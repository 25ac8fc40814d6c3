"""Which tensors are quantized to what: the one thing every other part agrees on."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from flatquant.formats import FORMATS, INTEGER, OFF, Format
from flatquant.formats.base import E4M3, E8M0
from flatquant.overrides import Override, fields_of, read_numbers

_FLAGS = {
    "asym": ("a_symmetric", False),
    "wasym": ("w_symmetric", False),
    "wtensor": ("w_tensor", True),
    "static": ("a_static", True),
}
_COUNTS = {"g": "w_group", "ag": "a_group", "kvg": "kv_group", "head": "head_bits"}
_COUNT = re.compile(r"([a-z]+)(\d+)")


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """Formats of weights, activations, keys and values; 16 bits means off.

    Plain integers run on integer kernels (docs/numerics.md): weights symmetric per output channel
    (or per group of input channels), activations per token and dynamic, keys and values
    asymmetric per token and head. Everything else runs simulated, and `flatquant.report` says so.

    Attributes:
        w_bits: bits of the weights of the decoder's linears, 2..8 or 16.
        a_bits: bits of the inputs of those linears, 2..8 or 16.
        k_bits: bits of cached keys, 2..8 or 16.
        v_bits: bits of cached values, 2..8 or 16.
        a_symmetric: symmetric (default) or asymmetric activation grid.
        w_group: input channels that share one weight scale; None is the whole channel.
        head_bits: bits of the output head and its input, 8 or 16; a tied embedding shares them.
        w_format: "int", or a name in `flatquant.formats.FORMATS`, which implies the bits.
        a_format: the same for activations.
        k_format: the same for keys.
        v_format: the same for values.
        w_symmetric: symmetric (default) or asymmetric weight grid.
        w_tensor: one weight scale for a whole matrix.
        a_static: one range for an input, found by calibration, instead of each token's own.
        a_group: channels of a token that share one scale; None is all of them.
        kv_group: channels of a head that share one scale; None is all of them.
        overrides: exceptions for some linears or attention modules; the last that applies wins.

    Raises:
        ValueError: a width outside 2..8 and 16, an unknown format, or parts that contradict each
            other.
    """

    w_bits: int = OFF
    a_bits: int = OFF
    k_bits: int = OFF
    v_bits: int = OFF
    a_symmetric: bool = True
    w_group: int | None = None
    head_bits: int = OFF
    w_format: str = INTEGER
    a_format: str = INTEGER
    k_format: str = INTEGER
    v_format: str = INTEGER
    w_symmetric: bool = True
    w_tensor: bool = False
    a_static: bool = False
    a_group: int | None = None
    kv_group: int | None = None
    overrides: tuple[Override, ...] = ()

    def __post_init__(self) -> None:
        for part in "wakv":
            name = f"{part}_bits"
            bits, kind = getattr(self, name), getattr(self, f"{part}_format")
            number = Format(kind=kind).number  # an unknown name is refused here
            if number is not None and bits in (OFF, number.bits):
                object.__setattr__(self, name, number.bits)
            elif number is not None:
                raise ValueError(f"Scheme: {name}={bits!r}, but {kind} has {number.bits} bits")
            elif not isinstance(bits, int) or not (2 <= bits <= 8 or bits == OFF):
                raise ValueError(f"Scheme: {name}={bits!r} must be 2..8, or 16 for off")
        if self.head_bits not in (8, OFF):
            raise ValueError(f"Scheme: head_bits={self.head_bits!r} must be 8, or 16 for off")
        self._check_weights()
        self._check_inputs()
        for override in self.overrides:
            override.applied(replace(self, overrides=()))  # a bad one is refused here

    def _check_weights(self) -> None:
        _check_group("w", self.w_group, self.w_bits, self.w_format)
        if self.w_tensor and (self.w_group is not None or self.weights.block is not None):
            raise ValueError("Scheme: w_tensor=True is one scale for all; groups have their own")
        if not self.w_symmetric and self.w_format != INTEGER:
            raise ValueError(f"Scheme: w_symmetric=False, but {self.w_format} has no zero point")
        integers = self.weights.kind == INTEGER and self.activations.by_row
        if self.w_group is not None and integers and self.w_symmetric and self.a_bits != OFF:
            raise ValueError(
                f"Scheme: w_group={self.w_group} with a_bits={self.a_bits}: the integer "
                "GEMM has one weight scale per output channel; use a_bits=16 or no groups"
            )

    def _check_inputs(self) -> None:
        _check_group("a", self.a_group, self.a_bits, self.a_format)
        if self.a_static and (self.a_bits == OFF or self.a_group is not None):
            raise ValueError(
                "Scheme: a_static=True needs a_bits below 16 and no groups, got a_bits="
                f"{self.a_bits}, a_group={self.a_group}"
            )
        if self.a_static and self.activations.scale == E8M0:
            raise ValueError(
                f"Scheme: a_static=True, but all scales of {self.a_format} are made at run time"
            )
        if not self.a_symmetric and self.a_format != INTEGER:
            raise ValueError(f"Scheme: a_symmetric=False, but {self.a_format} has no zero point")
        if self.kv_group is not None:
            if not self.quantizes_cache:
                raise ValueError(f"Scheme: kv_group={self.kv_group} needs k_bits below 16")
            for bits, kind in ((self.k_bits, self.k_format), (self.v_bits, self.v_format)):
                _check_group("kv", self.kv_group, min(bits, 8), kind)

    @property
    def weights(self) -> Format:
        """Format of the weights, [out, in]."""
        # the float32 unit of block scales is the whole matrix's
        whole = self.w_tensor or Format(kind=self.w_format).scale == E4M3
        return Format(
            kind=self.w_format,
            bits=self.w_bits,
            symmetric=self.w_symmetric,
            group=self.w_group,
            per_tensor=whole,
        )

    @property
    def activations(self) -> Format:
        """Format of the linears' inputs, [..., in]."""
        return Format(
            kind=self.a_format,
            bits=self.a_bits,
            symmetric=self.a_symmetric,
            group=self.a_group,
            static=self.a_static,
        )

    @property
    def keys(self) -> Format:
        """Format of the keys, [..., head_dim]."""
        return Format(kind=self.k_format, bits=self.k_bits, symmetric=False, group=self.kv_group)

    @property
    def values(self) -> Format:
        """Format of the values, [..., head_dim]."""
        return Format(kind=self.v_format, bits=self.v_bits, symmetric=False, group=self.kv_group)

    def check_width(self, channels: int) -> None:
        """Refuse a layer whose input channels the groups of weights or inputs do not divide.

        Raises:
            ValueError: naming both numbers.
        """
        self.weights.check_width(channels, "w_group")
        self.activations.check_width(channels, "a_group")

    def at(self, name: str) -> Scheme:
        """The scheme of one module, by its full name: overrides applied, and none left."""
        scheme = replace(self, overrides=()) if self.overrides else self
        for override in self.overrides:
            if override.matches(name):
                scheme = override.applied(scheme)
        return scheme

    def _everywhere(self) -> list[Scheme]:
        """What modules may get."""
        plain = replace(self, overrides=())
        return [plain, *(override.applied(plain) for override in self.overrides)]

    @property
    def quantizes_weights(self) -> bool:
        """Whether weights of linears are quantized, anywhere."""
        if not self.overrides:
            return self.w_bits != OFF
        return any(scheme.quantizes_weights for scheme in self._everywhere())

    @property
    def quantizes_activations(self) -> bool:
        """Whether inputs of linears are quantized, anywhere."""
        if not self.overrides:
            return self.a_bits != OFF
        return any(scheme.quantizes_activations for scheme in self._everywhere())

    @property
    def quantizes_linears(self) -> bool:
        """Whether the linears change at all."""
        return self.quantizes_weights or self.quantizes_activations

    @property
    def quantizes_cache(self) -> bool:
        """Whether keys or values are quantized, anywhere."""
        if not self.overrides:
            return self.k_bits != OFF or self.v_bits != OFF
        return any(scheme.quantizes_cache for scheme in self._everywhere())

    @classmethod
    def parse(cls, text: str | Scheme) -> Scheme:
        """Read "W4A4KV4", "W3A16-g128", "KV4", "K4V2", "WMXFP4AMXFP4", "W4A4KV4-down_proj:8".

        Options follow hyphens: asym (activations), wasym (weights), wtensor, static, gN (weights),
        agN (activations), kvgN, head8, and overrides PATTERN:NUMBERS or PATTERN@BLOCKS:NUMBERS.

        Raises:
            ValueError: the text is not of that form, or the scheme breaks a rule above.
        """
        if isinstance(text, Scheme):
            return text
        main, *options = str(text).split("-")
        numbers = read_numbers(main)
        if numbers is None:
            raise ValueError(f"scheme {text!r}: expected a form like W4A4KV4, W3A16-g128 or KV4")
        values: dict[str, object] = {}
        for part, number in numbers.items():
            values.update(fields_of(part, number))
        overrides = []
        for option in options:
            count = _COUNT.fullmatch(option)
            if ":" in option:
                overrides.append(Override.parse(option))
            elif option in _FLAGS:
                name, value = _FLAGS[option]
                values[name] = value
            elif count is not None and count[1] in _COUNTS:
                values[_COUNTS[count[1]]] = int(count[2])
            else:
                known = [*_FLAGS, *(f"{name}N" for name in _COUNTS), "PATTERN:NUMBERS"]
                raise ValueError(
                    f"scheme {text!r}: unknown option {option!r}; known: {', '.join(known)}"
                )
        return cls(**values, overrides=tuple(overrides))  # type: ignore[arg-type]

    def __str__(self) -> str:
        text = ""
        if self.w_bits != OFF or self.a_bits != OFF:
            text += f"W{_number(self.weights)}A{_number(self.activations)}"
        if self.k_bits != OFF or self.v_bits != OFF:
            k, v = _number(self.keys), _number(self.values)
            text += f"KV{k}" if k == v else f"K{k}V{v}"
        options = [name for name, (field, on) in _FLAGS.items() if getattr(self, field) == on]
        for name, field in _COUNTS.items():
            count = getattr(self, field)
            if count not in (None, OFF if field == "head_bits" else None):
                options.append(f"{name}{count}")
        return "-".join((text or "W16A16", *options, *map(str, self.overrides)))


def _number(format: Format) -> str:
    return str(format.bits) if format.kind == INTEGER else format.kind


def _check_group(part: str, group: int | None, bits: int, kind: str) -> None:
    """Refuse groups of nothing, and of a format that has its own.

    Raises:
        ValueError: naming the group.
    """
    if group is None:
        return
    name = f"{part}_group={group}"
    if group < 1:
        raise ValueError(f"Scheme: {name} must be at least 1")
    if bits == OFF:
        raise ValueError(f"Scheme: {name} needs {part}_bits below 16")
    if kind != INTEGER and FORMATS[kind].block is not None:
        raise ValueError(f"Scheme: {name}, but {kind} has blocks of {FORMATS[kind].block}")
