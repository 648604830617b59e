"""Tensors of a safetensors file, read by offset straight into memory of the caller's.

Files are not mapped: one that is cut short while it is read gives an error here, where a mapping would end the process.
A file that is deleted can still be read by who has opened it.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}
_MOST_HEADER = 100 << 20  # bytes; longer ones are no headers


@dataclass(frozen=True)
class _Entry:
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int


class TensorFile:
    """An open file of tensors.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no such file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = os.open(path, os.O_RDONLY)
        length = int.from_bytes(self._bytes(0, 8), "little")
        if length > _MOST_HEADER:
            raise ValueError(f"{path.name} is no file of tensors")
        header: dict[str, Any] = json.loads(self._bytes(8, length))
        self.metadata: dict[str, str] = header.pop("__metadata__", {})
        self._entries = {
            name: _Entry(_DTYPES[each["dtype"]], tuple(each["shape"]), 8 + length + each["data_offsets"][0])
            for name, each in header.items()
            if each["dtype"] in _DTYPES
        }

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            os.close(self._file)

    def _bytes(self, offset: int, length: int) -> bytearray:
        found = bytearray(length)
        self._read(memoryview(found), offset)
        return found

    def _read(self, into: memoryview, offset: int) -> None:
        while into:
            count = os.preadv(self._file, [into], offset)
            if not count:
                raise OSError(f"{self.path.name} ends too early")
            into, offset = into[count:], offset + count

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor; KeyError if there is none of that name."""
        return self._entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor."""
        return self._entries[name].dtype

    def whole(self, name: str) -> Tensor:
        """A whole tensor."""
        entry = self._entries[name]
        found = torch.empty(entry.shape, dtype=entry.dtype)
        if found.numel():
            self._read(_memory(found), entry.offset)
        return found

    def rows(self, name: str, head: int, start: int, into: Tensor) -> None:
        """Read some of a head's rows.

        Args:
            name: a tensor (heads, rows, width).
            head: which head.
            start: the first row.
            into: (rows, width), contiguous on the host and of the tensor's dtype; as many rows as it has are read.
        """
        entry = self._entries[name]
        _, rows, width = entry.shape
        self._read(_memory(into), entry.offset + (head * rows + start) * width * entry.dtype.itemsize)


def _memory(x: Tensor) -> memoryview:
    return x.view(torch.uint8).numpy().data.cast("B")
