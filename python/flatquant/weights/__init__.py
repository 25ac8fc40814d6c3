"""Weight quantizers. A new one is a frozen dataclass and a line in `WEIGHT_QUANTIZERS`."""

from flatquant.weights.base import QuantizedWeight, WeightQuantizer, WeightTask
from flatquant.weights.gptq import Gptq, Ldlq
from flatquant.weights.hessian import HessianCollector
from flatquant.weights.hqq import Hqq
from flatquant.weights.rtn import Rtn
from flatquant.weights.search import AwqClip, ClipSearch, MseClip
from flatquant.weights.sparse import Magnitude, Pruned, Wanda

WEIGHT_QUANTIZERS: dict[str, WeightQuantizer] = {
    "rtn": Rtn(),
    "rtn-mse": Rtn(clip=MseClip()),
    "rtn-awq": Rtn(clip=AwqClip()),
    "gptq": Gptq(),
    "gptq-mse": Gptq(clip=MseClip()),
    "gptq-awq": Gptq(clip=AwqClip()),
    "ldlq": Ldlq(),
    "hqq": Hqq(),
    "magnitude": Magnitude(),
    "wanda": Wanda(),
}
"""Names for the settings that papers and the command line ask for; any other value will do too."""


def weight_quantizer(choice: str | WeightQuantizer) -> WeightQuantizer:
    """The quantizer of a name, or the value itself.

    Raises:
        ValueError: unknown name.
    """
    if isinstance(choice, WeightQuantizer):
        return choice
    if choice not in WEIGHT_QUANTIZERS:
        raise ValueError(f"weights={choice!r} is unknown; known: {list(WEIGHT_QUANTIZERS)}")
    return WEIGHT_QUANTIZERS[choice]


__all__ = [
    "WEIGHT_QUANTIZERS",
    "AwqClip",
    "ClipSearch",
    "Gptq",
    "HessianCollector",
    "Hqq",
    "Ldlq",
    "Magnitude",
    "MseClip",
    "Pruned",
    "QuantizedWeight",
    "Rtn",
    "Wanda",
    "WeightQuantizer",
    "WeightTask",
    "weight_quantizer",
]
