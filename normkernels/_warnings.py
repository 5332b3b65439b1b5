"""Warnings that appear once in a process."""

from __future__ import annotations

import warnings

warned: set[str] = set()


def warn_once(message: str) -> None:
    """Warn with a message unless a call before has done so."""
    if message not in warned:
        warned.add(message)
        warnings.warn(message, stacklevel=3)
