"""Low-bit ops for FlatQuant: native kernels where they are built, the PyTorch reference elsewhere.

``ops`` holds the functions to call, ``reference`` their specification, ``packing`` the byte layout.
Importing never needs a GPU, libcuda, or a built library.
"""

from . import ops, packing, reference
from .library import activation_layout, backend, build_info

__version__ = "0.1.0"
__all__ = [
    "__version__",
    "activation_layout",
    "backend",
    "build_info",
    "ops",
    "packing",
    "reference",
]
