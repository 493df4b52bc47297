"""Memory for weights that stay: large pages where Linux gives them.

A row of x with a layer of 6 MB takes 200 us and touches 1,600 pages of 4 KiB, each at one more place of the page table;
in pages of 2 MiB the same bytes come a quarter sooner, and 512 page faults less are taken when they are written.

    chunk  | codes | scales | codes | scales | ... one private mapping of CHUNK_BYTES, advised MADV_HUGEPAGE
              ^ each a tensor with a storage of its own; the chunk goes when the last of them has gone

Weights smaller than LEAST_BYTES and systems without that advice get `torch.empty`. `HALFBYTE_HUGE_PAGES=0` switches
all of it off, and with it the same advice for large outputs (csrc/core/large_pages.h).
"""

import contextlib
import mmap
import os
import threading

import torch
from torch import Tensor

CHUNK_BYTES = 64 << 20
LEAST_BYTES = 64 << 10
ALIGNMENT = 128


class _Chunks:
    """The chunk that is being filled. It is owned by its tensors; here only until it is full."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._chunk: mmap.mmap | None = None
        self._used = 0

    def take(self, nbytes: int) -> Tensor | None:
        """`nbytes` of uint8, or None where the system has no mapping for us."""
        with self._lock:
            if nbytes > CHUNK_BYTES // 2:
                chunk = _mapping(nbytes)
                return None if chunk is None else torch.frombuffer(chunk, dtype=torch.uint8, count=nbytes)
            if self._chunk is None or self._used + nbytes > CHUNK_BYTES:
                self._chunk, self._used = _mapping(CHUNK_BYTES), 0
            if self._chunk is None:
                return None
            begin = self._used
            self._used += (nbytes + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
            return torch.frombuffer(self._chunk, dtype=torch.uint8, count=nbytes, offset=begin)


def _mapping(nbytes: int) -> mmap.mmap | None:
    try:
        chunk = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:
        return None
    with contextlib.suppress(OSError):  # a kernel without large pages: then it is ordinary memory
        chunk.madvise(mmap.MADV_HUGEPAGE)
    return chunk


_chunks = _Chunks()


def empty_weight(count: int, dtype: torch.dtype) -> Tensor:
    """An uninitialized flat tensor on the CPU for a weight, `count` elements, whose storage is its own."""
    nbytes = count * dtype.itemsize
    wanted = nbytes >= LEAST_BYTES and os.environ.get("HALFBYTE_HUGE_PAGES") != "0"
    if wanted and hasattr(mmap, "MADV_HUGEPAGE") and (taken := _chunks.take(nbytes)) is not None:
        return taken.view(dtype)
    return torch.empty(count, dtype=dtype)
