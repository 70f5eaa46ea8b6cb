"""How the C library of a Linux machine (glibc) deals out and takes back memory for large tensors on a CPU.

A piece above a threshold is a mapping of its own, which goes back to the system when it is freed: the next tensor of
that size is new memory, whose pages the system clears one by one as they are first touched. A smaller piece comes
from a heap that grows and is kept for the next. See mallopt(3). Elsewhere nothing here does anything.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

_TRIM, _MAPPED = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
_WORD, _IS_MAPPED = ctypes.sizeof(ctypes.c_size_t), 2  # the bit in the word before a piece (malloc.c)
_LARGEST, _MOST = 1 << 32, 1 << 14  # bytes of the largest gap looked for; gaps


@dataclass(frozen=True)
class Thresholds:
    """Bytes.

    Attributes:
        mapped: from this size on a piece is a mapping of its own.
        trimmed: free memory at the end of the heap beyond this goes back to the system.
    """

    mapped: int
    trimmed: int


#: Where glibc's own adaptation ends: it follows the largest freed piece up to here.
USUAL = Thresholds(32 << 20, 64 << 20)
#: Nearly every tensor is a mapping of its own, and nothing free is kept.
APART = Thresholds(64 << 10, 0)

_now = USUAL


@cache
def _library() -> Any:
    """glibc; None where the process has another C library, or another allocator in front of it."""
    if not sys.platform.startswith("linux") or "malloc" in os.environ.get("LD_PRELOAD", ""):
        return None
    try:
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018 - what only glibc has
        return library
    except (OSError, AttributeError):
        return None


def choose(wanted: Thresholds) -> bool:
    """Set both thresholds for the rest of the process; whether the C library took them."""
    global _now
    library = _library()
    if library is None:
        return False
    taken = library.mallopt(_MAPPED, wanted.mapped) and library.mallopt(_TRIM, wanted.trimmed)
    if taken:
        _now = wanted
    return bool(taken)


def trim() -> None:
    """Give back what is kept of freed memory."""
    if _library() is not None:
        _library().malloc_trim(0)


@contextlib.contextmanager
def apart() -> Iterator[bool]:
    """A block in which freed tensors go back at once, so that the process holds what its tensors do.

    Yields whether that is so. Slower by the pages that are cleared again and again. Afterwards the thresholds are
    those chosen before, or ``USUAL``.
    """
    before = _now
    trim()
    taken = choose(APART)
    filling = _fill() if taken else []
    try:
        yield taken
    finally:
        for piece in filling:
            _library().free(ctypes.c_void_p(piece))
        if taken:
            choose(before)


def _fill() -> list[int]:
    """Take the gaps of the heap that tensors would be put into, from where they would not go back; their addresses.

    What is taken is never touched, so that it occupies an address and no memory.
    """
    library, size = _library(), _LARGEST
    pieces: list[int] = []
    library.malloc.restype = ctypes.c_void_p
    while size >= APART.mapped and len(pieces) < _MOST:
        piece = library.malloc(ctypes.c_size_t(size))
        if piece and not ctypes.c_size_t.from_address(piece - _WORD).value & _IS_MAPPED:
            pieces.append(piece)
            continue  # there may be more of that size
        if piece:
            library.free(ctypes.c_void_p(piece))
        size = size * 3 // 4
    return pieces
