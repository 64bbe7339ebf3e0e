"""Work that the modes of this thread must not reach."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def in_own_thread(function: Callable[..., T], *args: object) -> T:
    """`function(*args)`, away from fake tensors, Dynamo and what else a trace has switched on for its thread."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(function, *args).result()
