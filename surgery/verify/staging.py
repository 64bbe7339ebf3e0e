"""Ranks that share one GPU: what they exchange goes through the host.

gloo carries tensors on the host, and NCCL takes one rank a GPU. Whoever has one GPU can so prove its kernels on P
ranks.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from torch import Tensor

from surgery import private

COLLECTIVES = ("all_gather_first_dim", "all_reduce_sum", "all_to_all_runs")


@contextmanager
def staged_through_host() -> Iterator[None]:
    """Within the block the collectives of graphs and their inputs take their tensors to the host, and results back."""
    with ExitStack() as stack:
        for name in COLLECTIVES:
            collective = getattr(private, name)
            for module in _users(name, collective):
                stack.enter_context(mock.patch.object(module, name, _staged(collective)))
        yield


def _users(name: str, collective: Callable[..., Tensor]) -> list[Any]:
    """The modules that have imported it by name."""
    own = [module for path, module in sys.modules.items() if path.startswith("surgery.") and module is not private]
    return [module for module in own if vars(module).get(name) is collective]


def _staged(collective: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def through_host(x: Tensor, *arguments: Any) -> Tensor:
        return collective(x.cpu(), *arguments).to(x.device)

    return through_host
