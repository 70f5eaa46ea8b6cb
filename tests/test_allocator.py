"""Where freed memory goes, by the kernel's own count."""

from __future__ import annotations

import pytest
import torch

from imagen_kit import allocator
from imagen_kit.bench import memory

MIB = 1 << 20
glibc = pytest.mark.skipif(allocator._library() is None, reason="the C library is not glibc")


def held() -> int:
    return memory._read("VmRSS") or 0


def scattered() -> list[torch.Tensor]:
    """Every second of 40 pieces of 2 MiB, the others freed: 40 MiB that are held, 40 MiB of gaps."""
    every = [torch.ones(MIB // 2) for _ in range(40)]
    return every[::2]


@glibc
def test_apart_gives_back_what_lies_between():
    with allocator.apart() as taken:
        before = held()
        kept = scattered()
        used = held() - before
    assert taken
    assert used == pytest.approx(40 * MIB, rel=0.1)
    assert len(kept) == 20


@glibc
def test_gaps_of_the_heap_are_not_used():
    allocator.choose(allocator.USUAL)
    kept = scattered()  # with gaps between them, in the heap
    with allocator.apart():
        allocator.trim()
        before = held()
        for _ in range(30):  # into a gap each, were they to be had
            torch.ones(MIB // 4)
        after = held() - before
    assert after < 2 * MIB
    assert len(kept) == 20


@glibc
def test_the_choice_before_holds_again_afterwards(monkeypatch):
    asked = []

    class Library:
        def mallopt(self, what, size):
            asked.append((what, size))
            return 1

        def malloc_trim(self, pad):
            return 1

    monkeypatch.setattr(allocator, "_fill", list)
    monkeypatch.setattr(allocator, "_library", lambda: Library())
    monkeypatch.setattr(allocator, "_now", allocator.Thresholds(7, 8))
    with allocator.apart():
        assert asked == [(-3, allocator.APART.mapped), (-1, allocator.APART.trimmed)]
    assert asked[2:] == [(-3, 7), (-1, 8)]


def test_elsewhere_nothing_happens(monkeypatch):
    monkeypatch.setattr(allocator, "_library", lambda: None)
    with allocator.apart() as taken:
        assert not taken
    assert not allocator.choose(allocator.USUAL)
    allocator.trim()
