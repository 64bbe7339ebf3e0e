"""In-place operations are written out of place where nothing else looks at what they write to."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from surgery.capture.gradless_writes import written_by
from surgery.capture.in_place import drop_idle_dropout, refuse_hidden_views, write_out_of_place
from surgery.errors import CaptureError

Function = Callable[[Tensor, Tensor], Tensor]


class Calling(nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.function(x, y)


def export(function: Function) -> torch.fx.GraphModule:
    """The flat graph of a function of x [b, 4] and y [b, 4], with what it writes in place."""
    dims = {0: torch.export.Dim("b")}
    inputs = (torch.ones(3, 4), torch.ones(3, 4))
    program = torch.export.export(Calling(function), inputs, dynamic_shapes=(dims, dims), strict=False)
    return program.graph_module


def with_index(x: Tensor, y: Tensor) -> Tensor:
    made = torch.empty_like(x)
    made[torch.arange(x.shape[0])] = y * 2
    return made


def between_reads(x: Tensor, y: Tensor) -> Tensor:
    made = x * y
    before = made.exp()
    made += y
    made *= before
    return made.sin() + before


def with_later_views(x: Tensor, y: Tensor) -> Tensor:
    made = x * y
    made += y
    left, right = made.chunk(2, dim=-1)
    return left * right


def of_a_tuple(x: Tensor, y: Tensor) -> Tensor:
    values, places = (x * y).topk(2)
    values /= values.sum(-1, keepdim=True)
    return values + places


@pytest.mark.parametrize(
    "function", [with_index, between_reads, with_later_views, of_a_tuple], ids=lambda f: f.__name__
)
def test_values_and_gradients_are_those_of_the_code(function: Function) -> None:
    module = export(function)
    assert any(written_by(node) for node in module.graph.nodes)
    assert write_out_of_place(module.graph)
    module.graph.lint()
    module.recompile()
    assert not any(written_by(node) for node in module.graph.nodes)
    x, y = (torch.randn(5, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    expected, found = function(x, y), module(x, y)[0]
    assert torch.equal(found, expected)
    for own, theirs in zip(
        torch.autograd.grad(found.sin().sum(), (x, y), allow_unused=True, materialize_grads=True),
        torch.autograd.grad(expected.sin().sum(), (x, y), allow_unused=True, materialize_grads=True),
        strict=True,
    ):
        torch.testing.assert_close(own, theirs, rtol=1e-10, atol=0)


LEFT: dict[str, Function] = {
    "an input": lambda x, y: x.add_(y),
    "a view of it is read": lambda x, y: _then(made := x * y, made.view(-1), made.add_(1)),
    "through a view": lambda x, y: _then(made := x * y, made[:, :2].add_(1), made),
    "a cast that does nothing": lambda x, y: _then(made := x * y, seen := made.type_as(y), seen.add_(1), made),
    "what keeps its type": lambda x, y: _then(made := x.half() * 1, made.add_(y), made.float()),
}


def _then(*values: Tensor) -> Tensor:
    return values[-1]


@pytest.mark.parametrize("name", LEFT)
def test_what_others_look_at_is_left(name: str) -> None:
    module = export(LEFT[name])
    before = module.print_readable(print_output=False)
    assert not write_out_of_place(module.graph)
    module.recompile()
    assert module.print_readable(print_output=False) == before


def _seen_through(view: Function) -> Function:
    """A view of a value that is written to afterwards."""
    return lambda x, y: _then(made := x * y, seen := view(made, y), made.add_(1), seen.sin())


@pytest.mark.parametrize("is_training", [False, True])
def test_dropout_that_is_off_is_its_operand(is_training: bool) -> None:
    function = _seen_through(lambda made, y: torch.dropout(made, 0.0 if is_training else 0.5, is_training))
    module = export(function)
    drop_idle_dropout(module.graph)
    assert write_out_of_place(module.graph)
    module.recompile()
    x, y = torch.randn(5, 4), torch.randn(5, 4)
    assert torch.equal(module(x, y)[0], function(x, y))


def test_views_that_their_schemas_hide_are_refused() -> None:
    module = export(_seen_through(lambda made, y: torch.einsum("ij->ji", made).T))
    with pytest.raises(CaptureError, match=r"add_.* writes to memory that the result of .*einsum.* shares"):
        refuse_hidden_views(module.graph)
