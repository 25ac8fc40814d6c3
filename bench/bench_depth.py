"""Peak memory of a calibration against the depth of the model, random models.

    python bench/bench_depth.py [--depths 4 8 16 32] [--dry-run]

Every model is calibrated twice, each time in a process of its own: read whole and kept in memory,
and read block by block from its folder with the finished blocks going to a work folder
(`flatquant.open_model`). What counts is the process's largest resident set, less what it was
before the model was opened.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from record import append
from safetensors.torch import save_file
from transformers import LlamaConfig

import flatquant

TOPIC = "calibration"
WAYS = ("in memory", "on disk")
HIDDEN, INNER, HEADS, VOCABULARY = 1024, 2816, 16, 1024
METHOD, SCHEME = "smoothquant", "W4A8KV4"


def main() -> None:
    """Write the models, calibrate them in child processes, record megabytes."""
    options = _options()
    if options.child:
        _calibrate(Path(options.child[0]), options.child[1])
        return
    for depth in options.depths:
        with tempfile.TemporaryDirectory() as folder:
            _write(Path(folder), depth)
            for way in WAYS:
                child = [sys.executable, __file__, "--child", folder, way]
                answer = subprocess.run(child, check=True, capture_output=True, text=True)
                megabytes = json.loads(answer.stdout.splitlines()[-1])
                what = f"random Llama, hidden {HIDDEN}/{METHOD} {SCHEME}/{depth} blocks/peak {way}"
                print(f"{what}: {megabytes} MB")
                if not options.dry_run:
                    command = "python bench/bench_depth.py"
                    append(TOPIC, what, megabytes, "MB", command=command)


def _write(folder: Path, depth: int) -> None:
    """A checkpoint in bfloat16, one file a block, written without ever being whole."""
    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=INNER, num_attention_heads=HEADS,
        num_hidden_layers=depth, vocab_size=VOCABULARY, tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"], dtype="bfloat16", max_position_embeddings=256,
    )  # fmt: skip
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * 0.02).bfloat16()

    def ones() -> torch.Tensor:
        return torch.ones(HIDDEN, dtype=torch.bfloat16)

    weight_map: dict[str, str] = {}

    def save(name: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))

    for index in range(depth):
        block = {f"self_attn.{part}_proj": random(HIDDEN, HIDDEN) for part in "qkvo"}
        block |= {f"mlp.{part}_proj": random(INNER, HIDDEN) for part in ("gate", "up")}
        block |= {"mlp.down_proj": random(HIDDEN, INNER)}
        block |= {"input_layernorm": ones(), "post_attention_layernorm": ones()}
        named = {f"model.layers.{index}.{key}.weight": value for key, value in block.items()}
        save(f"block-{index}.safetensors", named)
    outer = {"model.embed_tokens.weight": random(VOCABULARY, HIDDEN), "model.norm.weight": ones()}
    save("outer.safetensors", outer)
    index_file = folder / "model.safetensors.index.json"
    index_file.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _calibrate(folder: Path, way: str) -> None:
    """Calibrate in this process and print the growth of its peak in megabytes."""
    tokens = torch.randint(0, VOCABULARY, (8, 64), generator=torch.Generator().manual_seed(1))
    before = _status("VmRSS")
    if way == "on disk":
        model = flatquant.open_model(folder)
        work_dir: Path | None = folder / "work"
    else:
        from transformers import AutoModelForCausalLM

        model, work_dir = AutoModelForCausalLM.from_pretrained(folder, dtype="auto"), None
    flatquant.calibrate(model, METHOD, SCHEME, tokens, work_dir=work_dir, progress=False)
    print(round((_status("VmHWM") - before) / 1024))


def _status(field: str) -> int:
    """A line of /proc/self/status in kB; unlike getrusage's peak it starts anew with a program."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise SystemExit(f"/proc/self/status has no {field}: this needs Linux")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 8, 16, 32], metavar="BLOCKS")
    parser.add_argument("--dry-run", action="store_true", help="print, do not record")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
