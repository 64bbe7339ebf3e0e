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

COLLECTIVES = (private.all_gather_first_dim, private.all_reduce_sum, private.all_to_all_runs)
Collective = Callable[..., Tensor]


@contextmanager
def staged_through_host() -> Iterator[None]:
    """Within the block the collectives of graphs and their inputs take their tensors to the host, and results back."""
    with replaced_collectives(_staged):
        yield


@contextmanager
def replaced_collectives(replace: Callable[[Collective], Collective]) -> Iterator[None]:
    """Within the block, `replace(collective)` stands for each of them in every module that has imported it by name."""
    own = [module for path, module in sys.modules.items() if path.startswith("surgery.") and module is not private]
    with ExitStack() as stack:
        for collective in COLLECTIVES:
            for module in own:
                if vars(module).get(collective.__name__) is collective:
                    stack.enter_context(mock.patch.object(module, collective.__name__, replace(collective)))
        yield


def _staged(collective: Collective) -> Collective:
    def through_host(x: Tensor, *arguments: Any) -> Tensor:
        return collective(x.cpu(), *arguments).to(x.device)

    return through_host
