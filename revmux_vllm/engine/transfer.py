"""Many small host arrays reach the device in one copy.

Every copy from pageable memory may wait for the device, and every copy costs a launch. So the
arrays of a step are packed into one buffer, pinned where there is a GPU, and sliced over there.
"""

from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

ALIGNMENT = 16
"""Bytes at which every array begins: views of other element sizes need whole elements."""


def send(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """The arrays on ``device``, of their shapes and dtypes: views of one tensor.

    On a GPU nothing waits; the caching host allocator keeps the buffer until the copy is done.
    """
    sizes = [-(-array.nbytes // ALIGNMENT) * ALIGNMENT for array in arrays]
    starts = np.cumsum([0, *sizes])
    host = torch.empty(int(starts[-1]), dtype=torch.uint8, pin_memory=device.type == "cuda")
    flat = host.numpy()
    for array, start in zip(arrays, starts, strict=False):
        flat[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    there = host.to(device, non_blocking=True)
    return [
        there[start : start + array.nbytes]
        .view(torch.from_numpy(array[:0]).dtype)
        .view(array.shape)
        for array, start in zip(arrays, starts.tolist(), strict=False)
    ]


def sent(record: Any, device: torch.device) -> Any:
    """A dataclass, or a tuple of them, with its arrays on ``device``, also those inside it.

    Fields whose metadata says ``host`` stay as they are.
    """
    found: list[np.ndarray] = []

    def collect(array: np.ndarray) -> np.ndarray:
        found.append(array)
        return array

    _walk(record, collect)
    there = iter(send(found, device))
    return _walk(record, lambda _: next(there))


def _walk(value: Any, change: Callable[[np.ndarray], Any]) -> Any:
    """``value`` with every array in it changed, always in the same order."""
    if isinstance(value, np.ndarray):
        return change(value)
    if isinstance(value, tuple):
        return tuple(_walk(part, change) for part in value)
    if not is_dataclass(value) or isinstance(value, type):
        return value
    parts = {
        field.name: _walk(getattr(value, field.name), change)
        for field in fields(value)
        if not field.metadata.get("host")
    }
    return replace(value, **parts)
