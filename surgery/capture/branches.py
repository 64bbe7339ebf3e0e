"""Branches on what is in the data: a trace follows one side of each, and every call checks that its data take it.

    if padding.any():            found = any(padding)
        ...                ->    check = surgery::branch(found, 0, False)       OtherBranchError where it is True

The sides that a trace has taken, in the order that it met them, belong to the program: `(False,)`. A call whose data
take another side finds, or captures, the program for that one: `(True,)`. All ranks look at whole values, and so agree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import has_side_effect
from torch.overrides import TorchFunctionMode

from surgery.errors import CaptureError, InputError
from surgery.metadata import Skip, where
from surgery.private import GuardOnDataDependentSymNode

Sides = tuple[bool, ...]
MOST_BRANCHES = 8


class OtherBranchError(InputError):
    """The data of a call take the side `is_taken` of branch `index`, and the graph has the other."""

    def __init__(self, index: int, is_taken: bool) -> None:
        super().__init__(
            "the model's code branches on these data otherwise than on those that its graph was compiled for. "
            "Expected data of one kind. Call the model on such data uncompiled."
        )
        self.index = index
        self.is_taken = is_taken


@torch.library.custom_op("surgery::branch", mutates_args=())
def branch(condition: Tensor, index: int, is_taken: bool) -> Tensor:
    """Check that `condition`, one truth value, is `is_taken`. Returns it."""
    if bool(condition) is not is_taken:
        raise OtherBranchError(index, not is_taken)
    return condition.clone()


@branch.register_fake
def _(condition: Tensor, index: int, is_taken: bool) -> Tensor:
    return torch.empty_like(condition)


has_side_effect(torch.ops.surgery.branch.default)


def describe_branches(graph: fx.Graph) -> Iterator[Skip]:
    """What the report says of the branches that a trace has followed."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.surgery.branch.default):
        side = "true" if node.args[2] else "false"
        yield Skip(where(node), f"asks what is in the data, and takes the answer to be {side}; each call checks it")


class FollowedBranches(TorchFunctionMode):
    """While a model is traced, takes the side of each branch that `sides` say, and False beyond: `taken` is the record.

    Where this mode is off, such a branch ends the trace.
    """

    def __init__(self, sides: Sides) -> None:
        super().__init__()
        self.sides = sides
        self.taken: list[bool] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def ask() -> Any:
            return func(*args, **(kwargs or {}))

        is_truth = func is Tensor.__bool__ or (func is Tensor.item and args[0].dtype == torch.bool)
        return self._answer(args[0], ask) if is_truth else ask()

    def _answer(self, condition: Tensor, ask: Callable[[], Any]) -> bool:
        try:
            return bool(ask())
        except GuardOnDataDependentSymNode:
            return self._take(condition)

    def _take(self, condition: Tensor) -> bool:
        index = len(self.taken)
        if index == MOST_BRANCHES:
            raise CaptureError(f"the forward branches on data more than {MOST_BRANCHES} times. Expected fewer.")
        side = self.sides[index] if index < len(self.sides) else False
        self.taken.append(side)
        torch.ops.surgery.branch(condition, index, side)
        return side
