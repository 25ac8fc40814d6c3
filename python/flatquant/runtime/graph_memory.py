"""What a recorded step reads and writes, at fixed places: caches of a fixed size, and inputs."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from flatquant.runtime.storage import Lockstep
from flatquant_cuda import decoder as native

LARGEST_BATCH = 256
_STEP = 256  # capacities are multiples of this

Replay = Callable[[], Tensor]


def bucket(batch: int) -> int | None:
    """Sequences of the recording that serves a batch: 1, 2, 4, or a multiple of 8; None if none."""
    if not 0 < batch <= LARGEST_BATCH:
        return None
    return next((size for size in (1, 2, 4) if batch <= size), -(-batch // 8) * 8)


def capacity_for(positions: int) -> int:
    """Positions of the memory for a cache that is about to have so many: a quarter more."""
    return -(-(positions + positions // 4) // _STEP) * _STEP


class Memory:
    """Caches of all layers for `batch` sequences, the inputs of a step, and its recordings.

    Args:
        batch: sequences.
        capacity: positions.
        device: where.

    Attributes:
        caches: tensors [batch, kv_heads, capacity, ...] of all layers, as a plan binds them.
        replays: the recordings: with a mask, and without.
    """

    def __init__(self, batch: int, capacity: int, device: torch.device) -> None:
        self.batch, self.capacity = batch, capacity
        self.caches: list[Tensor] = []
        self.bound: native.BoundCache | None = None
        self.replays: dict[bool, Replay] = {}
        self.ids = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self.positions = torch.zeros_like(self.ids)
        self.slots = torch.full_like(self.ids, -1)
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        self.mask = torch.zeros(batch, 1, 1, capacity, dtype=torch.bool, device=device)
        self._starts = torch.arange(batch, device=device).unsqueeze(1) * capacity
        self._lent: list[weakref.ref[Tensor]] = []
        self._used = 0  # sequences, in the last step
        self._owner: weakref.ref[Lockstep] | None = None

    def holds(self, step: Lockstep) -> bool:
        """Whether the storages of a lockstep are here."""
        if self._owner is not None and self._owner() is step:
            return True  # an active lockstep keeps its tensors
        tensors = step.tensors()
        if len(tensors) != len(self._lent) or any(
            lent() is not tensor for lent, tensor in zip(self._lent, tensors, strict=True)
        ):
            return False
        self._owner = weakref.ref(step)
        return True

    def is_free(self) -> bool:
        """Whether nobody has a tensor of a former cache any more."""
        return all(lent() is None for lent in self._lent)

    def take_in(self, step: Lockstep) -> None:
        """Move the storages of a lockstep here, one by one: each old one is freed at once."""
        self._lent.clear()
        fresh = not self.caches
        for storage in step.storages:
            views = []
            for i, old in enumerate(storage.tensors, len(self._lent)):
                if fresh:
                    shape = (self.batch, old.shape[1], self.capacity, *old.shape[3:])
                    self.caches.append(torch.zeros(shape, dtype=old.dtype, device=old.device))
                view = self.caches[i][: step.batch]
                view[:, :, : step.length] = old[:, :, : step.length]
                views.append(view)
            storage.tensors = tuple(views)
            self._lent += map(weakref.ref, views)
        step.capacity, step.binding = self.capacity, None
        self._owner = weakref.ref(step)

    def fill(self, past: int, ids: Tensor, positions: Tensor | None, mask: Tensor | None) -> None:
        """Set the inputs of a step of ids [batch, 1] after `past` others.

        Sequences beyond those of `ids` are written nowhere and attend to nothing.
        """
        used = ids.shape[0]
        if used < self._used:
            self.slots.fill_(-1)
            self.lengths.zero_()
        self._used = used
        self.ids[:used] = ids
        if positions is None:
            self.positions.fill_(past)
        else:
            self.positions[:used] = positions
        torch.add(self._starts[:used], past, out=self.slots[:used])
        self.lengths[:used].fill_(past + 1)
        if mask is not None:
            self.mask[:used, 0, 0, : past + 1] = mask
