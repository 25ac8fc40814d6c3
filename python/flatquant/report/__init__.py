"""What a quantized model really runs: share quantized, kernels, what was left alone and why."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

import flatquant_cuda as fq
from flatquant.models import family_of
from flatquant.models.spec import Site
from flatquant.plan import QuantizationPlan
from flatquant.runtime import stack
from flatquant.runtime.attention import KVQuantizer
from flatquant.runtime.linear import QuantizedLinear
from flatquant.surgery import block_names


@dataclass(frozen=True, kw_only=True)
class LinearReport:
    """One linear layer: its name, its op, and who answers it ("native" or "reference")."""

    name: str
    kernel: str
    backend: str


@dataclass(frozen=True, kw_only=True)
class QuantizationReport:
    """What `report` found.

    Attributes:
        scheme: the model's scheme, or None if it is not quantized.
        quantized_share: parameters of quantized linears over all parameters of the model.
        linears: every quantized linear.
        left_alone: every other linear -> why.
        ops: every op that the model calls -> "native" or "reference".
        decoding: how a short call runs the decoder's blocks, or why not as one op.
    """

    scheme: str | None
    quantized_share: float
    linears: tuple[LinearReport, ...]
    left_alone: dict[str, str]
    ops: dict[str, str]
    decoding: str = ""

    @property
    def native(self) -> bool:
        """Whether every op of the model runs on a native kernel."""
        return bool(self.ops) and all(backend == "native" for backend in self.ops.values())

    def __str__(self) -> str:
        lines = [
            f"{self.scheme or 'not quantized'}: {self.quantized_share:.1%} of all parameters in "
            f"{len(self.linears)} quantized linears"
        ]
        lines += [f"  {op}: {backend}" for op, backend in sorted(self.ops.items())]
        lines += [f"  decoding: {self.decoding}"] if self.decoding else []
        lines += [f"  left alone: {name} ({why})" for name, why in self.left_alone.items()]
        return "\n".join(lines)


def report(model: nn.Module) -> QuantizationReport:
    """Describe a model: share quantized, op and backend of every linear, what was left alone."""
    plan: QuantizationPlan | None = getattr(model, "flatquant_plan", None)
    device = next(iter(model.parameters())).device.type
    linears, left_alone, ops = [], {}, {}
    inside, total = 0, sum(p.numel() for p in model.parameters())
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            size = module.in_features * module.out_features
            inside, total = inside + size, total + size
            native = (
                "reference" if module.kernel == "simulated" else fq.backend(module.kernel, device)
            )
            linears.append(LinearReport(name=name, kernel=module.kernel, backend=native))
            ops[module.kernel] = native
            quantizer = "kronecker_quantize" if module.spec.to_codes else "kronecker"
            if module.spec.to_codes or module.spec.left or module.spec.right:
                ops[quantizer] = fq.backend(quantizer, device)
        elif isinstance(module, nn.Linear):
            left_alone[name] = _why(model, name, plan)
        elif isinstance(module, KVQuantizer):
            used = ["kronecker"] if module.q_trans is not None else []
            if module.simulated:
                ops["simulated"] = "reference"
            else:
                used += ["kv_quantize_append", "kv_dequantize", "attention_decode"]
            ops.update({op: fq.backend(op, device) for op in used})
    return QuantizationReport(
        scheme=None if plan is None else str(plan.scheme),
        quantized_share=inside / max(total, 1),
        linears=tuple(linears),
        left_alone=left_alone,
        ops=ops,
        decoding="" if plan is None else _decoding(model),
    )


def _decoding(model: nn.Module) -> str:
    obstacle = stack.obstacle(model)
    return "all blocks as one op" if obstacle is None else f"ops one by one: {obstacle}"


def _why(model: nn.Module, name: str, plan: QuantizationPlan | None) -> str:
    if plan is None:
        return "the model is not quantized"
    if plan.ignores(name):
        return "listed in ignore"
    family = family_of(model.config)
    for block in block_names(model, family):
        for group in family.groups:
            if name in [f"{block}.{member}" for member in group.linears]:
                if not plan.scheme_of(name).quantizes_linears:
                    return f"scheme {plan.scheme} does not quantize linears"
                if group.site is Site.ATTN_IN or len(group.linears) > 1:
                    return "shares its input with a linear that is listed in ignore"
                return "listed in ignore"
    return "outside the decoder blocks"


__all__ = ["LinearReport", "QuantizationReport", "report"]
