"""Steps of single tokens as CUDA graphs: one launch a token, whatever the number of layers.

The GPU works off a decoder layer of a token faster than a host can launch its dozen kernels. So the
second step of a cache in a row moves it into memory of a fixed size, and what the step launches
is recorded there, once; every later step replays it. Where a token goes and how much of the cache
is in use are numbers on the device, so one recording serves all lengths up to the capacity. Memory
and recordings wait for the next cache when one is gone.

A step takes the plain way, with the same bits, if any of these does not hold: one token id for each
sequence and a batch of at most 256; no mask, or a two-dimensional one as long as the
text; the same cache for the second time in a row (beam search exchanges its memory at every token);
a rotary embedding that does not depend on the length; no hooks on embedding, rotary embedding and
last norm; nobody is recording already; memory for it.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from flatquant.runtime.graph_memory import Memory, Replay, bucket, capacity_for
from flatquant.runtime.head import SharedEmbedding
from flatquant.runtime.storage import Lockstep
from flatquant_cuda import decoder as native

_IDLE = 2  # memories that are kept for caches to come


class Recorder(Protocol):
    """How steps are recorded."""

    def busy(self) -> bool:
        """Whether somebody is recording on the current stream."""

    def record(self, step: Replay) -> Replay:
        """Record what `step` launches, without running it.

        The result runs it, and returns the tensor that `step` returned.
        """


class CudaRecorder:
    """By torch.cuda.CUDAGraph, on a stream of its own, with memory of its own.

    Args:
        device: where the steps run.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def busy(self) -> bool:
        """Whether the device's current stream is being captured."""
        with torch.cuda.device(self._device):
            return torch.cuda.is_current_stream_capturing()

    def record(self, step: Replay) -> Replay:
        """See `Recorder`. Other threads may go on with their work meanwhile."""
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._device)
        own = torch.cuda.Stream(self._device)
        own.wait_stream(current)
        with torch.cuda.stream(own):  # which makes its device the current one
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                output = step()
            finally:
                graph.capture_end()
        current.wait_stream(own)

        def replay() -> Tensor:
            graph.replay()
            return output

        return replay


class Graphs:
    """The recordings of a decoder's steps.

    Args:
        plan: the decoder's blocks.
        recorder: how to record.

    Attributes:
        obstacle: why steps are not recorded; None if they are.
    """

    def __init__(self, plan: native.DecoderPlan, recorder: Recorder | None = None) -> None:
        self.obstacle: str | None = None
        self._plan, self._recorder = plan, recorder or CudaRecorder(plan.device)
        self._memories: list[Memory] = []  # those used last at the end
        self._outside: list[int] = []
        self._seen: weakref.WeakSet[Lockstep] = weakref.WeakSet()
        self._lock = threading.Lock()

    def run(
        self,
        decoder: Any,
        step: Lockstep,
        ids: Tensor,
        positions: Tensor | None,
        mask: Tensor | None,
    ) -> Tensor | None:
        """The decoder's last hidden state [batch, 1, hidden] for one more token per sequence.

        Args:
            decoder: the module that maps ids to hidden states.
            step: its cache, with room for a token; its length is the caller's to advance.
            ids: int64 [batch, 1].
            positions: int64 [1 or batch, 1]; None: the length of the cache.
            mask: [batch, length + 1], not 0 where a token may be attended to.

        Returns:
            None if this step has to take the plain way.
        """
        size = bucket(ids.shape[0])
        if (
            self.obstacle is not None
            or size is None
            or ids.shape != (step.batch, 1)
            or (mask is not None and mask.shape != (step.batch, step.length + 1))
            or (positions is not None and positions.shape not in ((1, 1), ids.shape))
            or self._recorder.busy()
        ):
            return None
        with self._lock, torch.inference_mode(False), torch.no_grad():
            if not self._same_outside(decoder):
                return None
            memory = next((found for found in self._memories if found.holds(step)), None)
            if memory is None:
                if step not in self._seen:
                    self._seen.add(step)
                    return None
                memory = self._move(step, size)
            if memory is None:
                return None
            memory.fill(step.length, ids, positions, mask)
            return self._step(decoder, memory, mask is not None)[: step.batch].clone()

    def clear(self) -> None:
        """Forget all recordings, and any obstacle; caches keep their memory."""
        with self._lock:
            self.obstacle = None
            self._memories.clear()

    def _step(self, decoder: Any, memory: Memory, masked: bool) -> Tensor:
        """The answer to the inputs of a memory; recorded after the first time."""

        def step() -> Tensor:
            assert memory.bound is not None
            hidden = decoder.embed_tokens(memory.ids)
            cos, sin = decoder.rotary_emb(hidden, memory.positions)
            hidden = self._plan.run(
                hidden,
                cos,
                sin,
                memory.bound,
                past=memory.capacity - 1,
                mask=memory.mask if masked else None,
                slots=memory.slots,
                lengths=memory.lengths,
            )
            result: Tensor = decoder.norm(hidden)
            return result

        replay = memory.replays.get(masked)
        if replay is not None:
            return replay()
        answer = step()
        try:
            memory.replays[masked] = self._recorder.record(step)
        except RuntimeError as error:
            self.obstacle = f"recording failed: {error}"
        return answer

    def _move(self, step: Lockstep, size: int) -> Memory | None:
        """Memory for a lockstep, which is there then."""
        wanted = capacity_for(step.length + 1)
        free = [found for found in self._memories if found.is_free()]
        fitting = [m for m in free if m.batch == size and step.length < m.capacity <= 2 * wanted]
        try:
            memory = (
                min(fitting, key=lambda found: found.capacity)
                if fitting
                else Memory(size, wanted, step.device)
            )
            memory.take_in(step)
            memory.bound = memory.bound or self._plan.bind_cache(memory.caches)
        except torch.OutOfMemoryError:
            self.obstacle = f"no memory for {size} sequences of {wanted} positions"
            self._memories.clear()
            step.capacity, step.binding = min(s.capacity for s in step.storages), None
            return None
        idle = [found for found in free if found is not memory]
        dropped = idle[: max(0, len(idle) - _IDLE)]
        self._memories = [m for m in self._memories if m is not memory and m not in dropped]
        self._memories.append(memory)
        return memory

    def _same_outside(self, decoder: Any) -> bool:
        """Whether what is recorded beside the blocks is what it was; if not, all is forgotten."""
        modules = [decoder.embed_tokens, decoder.rotary_emb, decoder.norm]
        if any(module._forward_hooks or module._forward_pre_hooks for module in modules):
            return False
        kind = getattr(decoder.rotary_emb, "rope_type", "default")
        if "dynamic" in kind or kind == "longrope":
            self.obstacle = f'the rotary embedding "{kind}" depends on the length'
            return False
        now = [*map(id, modules), *(tensor.data_ptr() for tensor in _tensors(modules))]
        if now != self._outside:
            self._outside = now
            for memory in self._memories:
                memory.replays.clear()
        return True


def _tensors(modules: list[nn.Module]) -> Iterator[Tensor]:
    """What modules read."""
    for module in modules:
        source = vars(module)["head"] if type(module) is SharedEmbedding else module
        yield from source.parameters()
        yield from source.buffers()
