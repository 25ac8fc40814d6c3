"""The `quantization_config` block of config.json."""

from __future__ import annotations

from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from flatquant.plan import FORMAT_VERSION, QuantizationPlan

METHOD = "flatquant"
"""Value of `quant_method`."""


class FlatQuantConfig(QuantizationConfigMixin):
    """What a checkpoint says about itself; plain JSON values only.

    Attributes:
        quant_method: "flatquant".
        format_version: of the tensors and of this block.
        plan: `QuantizationPlan.to_dict()`.
        sha256: file name of each shard -> digest.
        attend_unquantized_prefill: option of the attention, see `KVQuantizer`.
        producer: who wrote it, for humans.

    Raises:
        ValueError: another method, a newer format, or a field this version does not know.
    """

    def __init__(
        self,
        quant_method: str = METHOD,
        format_version: int = FORMAT_VERSION,
        plan: dict[str, Any] | None = None,
        sha256: dict[str, str] | None = None,
        attend_unquantized_prefill: bool = False,
        producer: str = "",
        **unknown: Any,
    ) -> None:
        if quant_method != METHOD:
            raise ValueError(
                f"quantization_config: quant_method is {quant_method!r}, not {METHOD!r}"
            )
        if not isinstance(format_version, int) or not 1 <= format_version <= FORMAT_VERSION:
            raise ValueError(
                f"quantization_config: format_version is {format_version!r}, this version of "
                f"flatquant reads 1..{FORMAT_VERSION}; the folder was written by "
                f"{producer or 'an unknown version'}: upgrade flatquant"
            )
        if unknown:
            raise ValueError(
                f"quantization_config: unknown fields {sorted(unknown)}; format_version "
                f"{format_version} does not have them (written by {producer or 'unknown'})"
            )
        self.quant_method = METHOD
        self.format_version = format_version
        self.plan = dict(plan or {})
        self.sha256 = dict(sha256 or {})
        self.attend_unquantized_prefill = bool(attend_unquantized_prefill)
        self.producer = producer

    def read_plan(self) -> QuantizationPlan:
        """The plan as an object.

        Raises:
            ValueError: it is incomplete or names something unknown.
        """
        try:
            return QuantizationPlan.from_dict(self.plan)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"quantization_config.plan: {error}") from error


__all__ = ["METHOD", "FlatQuantConfig"]
