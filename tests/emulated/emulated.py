"""The torch library flatquant_emulated: csrc/cuda on the host, and its switches."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from tests.ops.cases import Call

ORDERS = ("forward", "reverse", "shuffled:1")
GPUS = ("A100-80G", "RTX 3090", "H100 SXM")


class Emulated:
    """A build of the library, loaded into this process; there can be one."""

    def __init__(self, path: Path) -> None:
        torch.ops.load_library(str(path))
        self.library = ctypes.CDLL(str(path))
        self.checked: set[str] = set()  # ids of the rows that have run
        self.differences: dict[str, tuple[int, int]] = {}  # their codes: how many, of how many
        self.library.flatquant_emulated_launches.restype = ctypes.c_char_p

    def has(self, op: str) -> bool:
        """Whether csrc/cuda has the op."""
        return torch._C._dispatch_has_kernel_for_dispatch_key(f"flatquant_emulated::{op}", "CPU")

    def choose(
        self, gpu: str = GPUS[-1], order: str = ORDERS[0], *, shift: int = 0, most_blocks: int = 0
    ) -> None:
        """The GPU and the order of the threads; outputs lie ``shift`` elements off alignment.

        ``most_blocks``: launch no more than that, for kernels that take any number of blocks.
        """
        if self.library.flatquant_emulated_gpu(gpu.encode()) != 1:
            raise ValueError(f"no GPU {gpu!r} in csrc/cuda/gpu.h")
        if self.library.flatquant_emulated_order(order.encode()) != 1:
            raise ValueError(f"no order {order!r}")
        self.library.flatquant_emulated_shift_outputs(ctypes.c_int(shift))
        self.library.flatquant_emulated_most_blocks(ctypes.c_uint(most_blocks))

    def run(self, call: Call) -> tuple[Tensor, ...]:
        """The answer of the CUDA sources."""
        op = getattr(torch.ops.flatquant_emulated, call.op)
        named = call.named()
        cache: tuple[Tensor, ...] = ()
        if call.op == "kv_quantize_append":  # which writes into it
            cache = tuple(named[name].clone() for name in ("codes", "scale", "zero"))
            named |= dict(zip(("codes", "scale", "zero"), cache, strict=True))
        result = op(*(named[argument.name] for argument in op.default._schema.arguments))
        return cache or (result if isinstance(result, tuple) else (result,))

    def launches(self) -> list[str]:
        """What was launched since the last call: kernel, grid, block, cluster, shared memory."""
        text: bytes = self.library.flatquant_emulated_launches()
        return text.decode().splitlines()
