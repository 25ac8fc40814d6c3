"""FlatQuant for everyone: 4-bit weights, activations and KV cache that really run in 4 bits.

    import flatquant
    model = flatquant.quantize(model, "flatquant", "W4A4KV4", calibration=token_ids)
    print(flatquant.report(model))
    model.save_pretrained("model-w4a4kv4")

Importing this package also registers its checkpoints with transformers.
"""

from flatquant.capture import random_crops
from flatquant.checkpoint import load, save
from flatquant.deploy import quantize, replace_linear
from flatquant.evaluate import perplexity
from flatquant.fit import FitDivergedError
from flatquant.integrations.hf import FlatQuantConfig  # registers the checkpoint format
from flatquant.methods import METHODS
from flatquant.offload import open_model
from flatquant.pipeline import calibrate
from flatquant.plan import QuantizationPlan
from flatquant.recipe import FitConfig, Recipe, ScaleConfig
from flatquant.report import QuantizationReport, report
from flatquant.result import CalibrationResult
from flatquant.runtime.stack import fast_path
from flatquant.scheme import Scheme
from flatquant.sensitivity import measure_sensitivity, mixed_precision
from flatquant.shortening import block_influence, shortgpt
from flatquant.surgery import fake_quantized

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "CalibrationResult",
    "FitConfig",
    "FitDivergedError",
    "FlatQuantConfig",
    "QuantizationPlan",
    "QuantizationReport",
    "Recipe",
    "ScaleConfig",
    "Scheme",
    "block_influence",
    "calibrate",
    "fake_quantized",
    "fast_path",
    "load",
    "measure_sensitivity",
    "mixed_precision",
    "open_model",
    "perplexity",
    "quantize",
    "random_crops",
    "replace_linear",
    "report",
    "save",
    "shortgpt",
]
