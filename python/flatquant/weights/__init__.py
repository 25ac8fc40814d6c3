"""Weight quantizers. A new one is a function and a line in `WEIGHT_QUANTIZERS`."""

from flatquant.weights.base import QuantizedWeight, WeightQuantizer, WeightTask
from flatquant.weights.gptq import gptq
from flatquant.weights.rtn import round_to_nearest

WEIGHT_QUANTIZERS: dict[str, WeightQuantizer] = {
    "rtn": WeightQuantizer(round_to_nearest),
    "gptq": WeightQuantizer(gptq, needs_hessian=True),
}

__all__ = ["WEIGHT_QUANTIZERS", "QuantizedWeight", "WeightQuantizer", "WeightTask"]
