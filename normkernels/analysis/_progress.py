"""A progress bar for work that takes minutes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")


def track(items: Iterable[T], total: int, what: str, progress: bool) -> Iterable[T]:
    """Return the items, counted by tqdm on stderr where progress is asked for. tqdm is imported only then."""
    if not progress:
        return items
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError("progress=True: expected the package tqdm, got none; pip install tqdm") from error
    bar: Iterable[T] = tqdm(items, total=total, desc=what)
    return bar
