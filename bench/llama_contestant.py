"""llama.cpp as a contestant, through the C functions that llama-cpp-python binds."""

from __future__ import annotations

import ctypes
import importlib
import time
from pathlib import Path
from typing import Any

import numpy as np
from contestant import ROOM, repeat, token_ids

llama: Any = importlib.import_module("llama_cpp.llama_cpp")  # need not be installed

#: Tokens that llama.cpp takes in one call and computes at once: its own defaults.
_BATCH, _MICRO_BATCH = 2048, 512
_FTYPES = {"Q4_0": llama.LLAMA_FTYPE_MOSTLY_Q4_0, "Q8_0": llama.LLAMA_FTYPE_MOSTLY_Q8_0}


def quantize(source: Path, target: Path, kind: str, threads: int) -> None:
    """Requantize a GGUF file to "Q4_0" or "Q8_0" through llama.cpp's own function.

    Raises:
        RuntimeError: llama.cpp refuses.
    """
    silence()
    options = llama.llama_model_quantize_default_params()
    options.ftype, options.allow_requantize, options.nthread = _FTYPES[kind], True, threads
    code = llama.llama_model_quantize(str(source).encode(), str(target).encode(), options)
    if code != 0:
        raise RuntimeError(f"quantize: llama_model_quantize of {source} to {kind}: error {code}")


@llama.llama_log_callback
def _ignore(level: int, text: bytes, data: object) -> None:
    """Nobody reads the log."""


def silence() -> None:
    """Start llama.cpp without its log."""
    llama.llama_log_set(_ignore, ctypes.c_void_p(0))
    llama.llama_backend_init()


class LlamaContestant:
    """A GGUF file on llama.cpp, with its flash attention or without; methods as in `Contestant`.

    Args:
        file: the GGUF file.
        flash: whether to use flash attention.
    """

    def __init__(self, file: Path, *, flash: bool) -> None:
        import torch  # for the number of threads that everyone gets

        silence()
        self.file, self.flash, self.threads = file, flash, torch.get_num_threads()
        self.model: Any = None
        self.context: Any = None
        self.made_for: tuple[int, int] | None = None

    def load(self) -> None:
        """Load the model."""
        options = llama.llama_model_default_params()
        options.n_gpu_layers = 0
        self.model = llama.llama_model_load_from_file(str(self.file).encode(), options)
        if not self.model:
            raise RuntimeError(f"LlamaContestant: llama.cpp cannot load {self.file}")
        self.vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self.model))

    def prefill(self, tokens: int, batch: int) -> float:
        """Time of a prompt, up to the logits of its last token."""
        self._open(tokens, batch)
        prompt = token_ids(tokens)
        seconds = 0.0
        for sequence in range(batch):
            self._put([(token, place, sequence) for place, token in enumerate(prompt)])
            start = time.perf_counter()
            self._decode()
            seconds += time.perf_counter() - start
        return seconds

    def step(self, context: int, batch: int, seconds: float) -> list[float]:
        """Times of decoding steps after a context."""
        self._open(context, batch, filled=True)
        tokens, place = [1000] * batch, context

        def once() -> None:
            nonlocal tokens, place
            self._put([(token, place, row) for row, token in enumerate(tokens)], batch)
            tokens = self._decode(batch)
            place += 1

        return repeat(once, seconds)

    def generate(self, context: int, batch: int, seconds: float) -> list[float]:
        """The same: a step in a loop is how llama.cpp generates."""
        return self.step(context, batch, seconds)

    def _open(self, tokens: int, batch: int, filled: bool = False) -> None:
        """A context for `batch` sequences: empty, or each with `tokens` tokens."""
        size = -(-(tokens + ROOM) // 256) * 256
        fresh = self.made_for != (size, batch)
        if fresh:
            if self.context is not None:
                llama.llama_free(self.context)
            options = llama.llama_context_default_params()
            options.n_ctx, options.n_seq_max, options.kv_unified = size * batch, batch, False
            options.n_batch, options.n_ubatch = _BATCH, _MICRO_BATCH
            options.n_threads = options.n_threads_batch = self.threads
            options.flash_attn_type = int(self.flash)
            self.context = llama.llama_init_from_model(self.model, options)
            if not self.context:
                raise RuntimeError(f"LlamaContestant: no context of {size} x {batch} tokens")
            self.memory = llama.llama_get_memory(self.context)
            self.batch = llama.llama_batch_init(max(tokens, batch, _BATCH), 0, 1)
            self.made_for, self.tokens = (size, batch), 0
        if not filled:
            llama.llama_memory_clear(self.memory, True)
            self.tokens = 0
        elif self.tokens != tokens:
            llama.llama_memory_clear(self.memory, True)
            self._put([(token, place, 0) for place, token in enumerate(token_ids(tokens))])
            self._decode()
            for sequence in range(1, batch):
                llama.llama_memory_seq_cp(self.memory, 0, sequence, -1, -1)
            self.tokens = tokens
        else:  # forget what the last steps added
            for sequence in range(batch):
                llama.llama_memory_seq_rm(self.memory, sequence, tokens, -1)

    def _put(self, entries: list[tuple[int, int, int]], outputs: int = 1) -> None:
        """Make (token, position, sequence) entries the next batch; logits of the last ones."""
        batch, count = self.batch, len(entries)
        batch.n_tokens = count
        for index, (token, place, sequence) in enumerate(entries):
            batch.token[index], batch.pos[index] = token, place
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, sequence
            batch.logits[index] = index >= count - outputs

    def _decode(self, outputs: int = 1) -> list[int]:
        """Run the batch; the greedy choices."""
        code = llama.llama_decode(self.context, self.batch)
        if code != 0:
            raise RuntimeError(f"LlamaContestant: llama_decode: error {code}")
        llama.llama_synchronize(self.context)
        logits = np.ctypeslib.as_array(
            llama.llama_get_logits(self.context), shape=(outputs, self.vocabulary)
        )
        return [int(choice) for choice in logits.argmax(-1)]
