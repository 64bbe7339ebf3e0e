"""In-place operations are written out of place where nothing else looks at what they write to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from surgery.capture.gradless_writes import written_by
from surgery.capture.in_place import drop_idle_dropout, refuse_hidden_views, without_writes, write_out_of_place
from surgery.errors import CaptureError

Function = Callable[[Tensor, Tensor], Tensor]


class Calling(nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.function(x, y)


def export(function: Function) -> ExportedProgram:
    """The program of a function of x [b, 4] and y [b, 4], b at least 3, with what it writes in place."""
    dims = {0: torch.export.Dim("b", min=3)}
    inputs = (torch.ones(3, 4), torch.ones(3, 4))
    return torch.export.export(Calling(function), inputs, dynamic_shapes=(dims, dims), strict=False)


def assert_alike(function: Function, module: Callable[..., Tensor]) -> None:
    """The same values and gradients; those of float32 within its rounding."""
    x, y = (torch.randn(5, 4, requires_grad=True) for _ in range(2))
    expected, found = function(x, y), module(x, y)
    torch.testing.assert_close(found, expected)
    options: Any = {"allow_unused": True, "materialize_grads": True}
    for own, theirs in zip(
        torch.autograd.grad(found.sum(), (x, y), **options),
        torch.autograd.grad(expected.sum(), (x, y), **options),
        strict=True,
    ):
        torch.testing.assert_close(own, theirs)


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


def seen_by_einsum_afterwards(x: Tensor, y: Tensor) -> Tensor:
    made = x * y
    made += 1
    return torch.einsum("ij->ji", made).sin()


def of_a_tuple(x: Tensor, y: Tensor) -> Tensor:
    values, places = (x * y).topk(2)
    values /= values.sum(-1, keepdim=True)
    return values + places


def to_parts(x: Tensor, y: Tensor) -> Tensor:
    made = x * y
    made[:, :2].add_(1)
    made[1:][:, 2] = y[:1, 3] * 2
    made[0].fill_(3)
    made *= x
    return made.sin()


def to_parts_taken_before(x: Tensor, y: Tensor) -> Tensor:
    made = x * y
    first, rest = made[:, 0], made[:, 1:]
    rest.mul_(x[:, 1:])
    made.add_(1)
    first.copy_(made[:, 2].clone())
    return made.sin()


def shifted(x: Tensor, y: Tensor) -> Tensor:
    made = x * y
    last = made[:, -1].clone()
    made[:, 1:] = made[:, :-1].clone()
    made[:, 0] = last
    return made * y


@pytest.mark.parametrize(
    "function",
    [
        with_index,
        between_reads,
        with_later_views,
        seen_by_einsum_afterwards,
        of_a_tuple,
        to_parts,
        to_parts_taken_before,
        shifted,
    ],
    ids=lambda f: f.__name__,
)
def test_values_and_gradients_are_those_of_the_code(function: Function) -> None:
    program = export(function)
    assert any(written_by(node) for node in program.graph.nodes)
    assert write_out_of_place(program.graph)
    program.graph.lint()
    assert not any(written_by(node) for node in program.graph.nodes)
    program.graph_module.recompile()
    assert_alike(function, program.module())


LEFT: dict[str, Function] = {
    "a view of it is read": lambda x, y: _then(made := x * y, seen := made.view(-1), made.add_(1), seen.sin()),
    "through a view": lambda x, y: _then(made := x * y, made.view(-1).add_(1), made),
    "through a part of a view": lambda x, y: _then(made := x * y, made.view(-1)[2:].add_(1), made.sin()),
    "through a part of one of several views": lambda x, y: _then(
        made := (x * 9).long(), made.chunk(2, -1)[0][:, :1].fill_(3), made * y
    ),
    "a part of it is read": lambda x, y: _then(made := x * y, part := made[:, :2], part.add_(1), part.sin()),
    "what was written to a part is read": lambda x, y: _then(
        made := x * y, written := made[:, :2].add_(1), made.add_(1), written.sin()
    ),
    "what changes its shape": lambda x, y: _then(
        made := (x * y)[:3, :3] * 1, part := made[:, 0], made.transpose_(0, 1), part.add_(3), made.sin()
    ),
    "a part that changes its shape": lambda x, y: _then(made := x * y, made[:, :1].squeeze_(1), made.sin()),
    "a part of another type": lambda x, y: _then(made := x * y, made[:, :2].copy_(y[:, :2].double()), made.sin()),
    "a copy that its schema calls a view": lambda x, y: _then(
        made := x * y, made.mul_(2), copy := made.t().contiguous(), seen := copy.view(-1), copy.add_(1), seen.sin()
    ),
    "a cast": lambda x, y: _then(made := x * y, made.mul_(2), cast := made.double(), cast[:, :2].add_(1), cast),
    "what keeps its type": lambda x, y: _then(made := x.half() * 1, made.add_(y), made.float()),
    "what has no derivative": lambda x, y: _then(made := torch.empty_like(x), made.copy_(y * 2), made.sin()),
    "several": lambda x, y: _then(made := x * y, torch._foreach_mul_([made], 2.0), made.sin()),
}


def _then(*values: Any) -> Tensor:
    result: Tensor = values[-1]
    return result


@pytest.mark.parametrize("name", LEFT)
def test_what_views_see_is_left_to_torch(name: str) -> None:
    program = export(LEFT[name])
    before = program.graph_module.print_readable(print_output=False)
    refuse_hidden_views(program.graph)
    assert not write_out_of_place(program.graph)
    program.graph_module.recompile()
    assert program.graph_module.print_readable(print_output=False) == before
    assert_alike(LEFT[name], without_writes(program).module())


def _seen_through(view: Function) -> Function:
    """A view of a value that is written to afterwards."""
    return lambda x, y: _then(made := x * y, seen := view(made, y), made.add_(1), seen.sin())


@pytest.mark.parametrize(
    "dropout", [torch.dropout, torch.alpha_dropout, torch.feature_dropout], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("is_training", [False, True])
def test_dropout_that_is_off_is_its_operand(dropout: Callable[..., Tensor], is_training: bool) -> None:
    function = _seen_through(lambda made, y: dropout(made, 0.0 if is_training else 0.5, is_training))
    program = export(function)
    drop_idle_dropout(program.graph)
    assert write_out_of_place(program.graph)
    program.graph_module.recompile()
    assert_alike(function, program.module())


def test_dropout_that_is_on_is_kept() -> None:
    program = export(lambda x, y: torch.dropout(x * y, 0.5, True))
    drop_idle_dropout(program.graph)
    assert any(node.target is torch.ops.aten.dropout.default for node in program.graph.nodes)


HIDDEN: dict[str, Function] = {
    "read afterwards": _seen_through(lambda made, y: torch.einsum("ij->ji", made).T),
    "written through": lambda x, y: _then(made := x * y, torch.einsum("ij->ji", made).add_(1), made.sin()),
    "of a cast": lambda x, y: _then(made := x.double(), seen := torch.einsum("ij->ji", made), made.add_(1), seen.sin()),
    "of an input": lambda x, y: torch.einsum("ij->ji", x).add_(1),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_views_of_which_no_schema_tells_are_refused(name: str) -> None:
    with pytest.raises(CaptureError, match=r"add_.* writes to memory that the result of .*einsum.* shares"):
        refuse_hidden_views(export(HIDDEN[name]).graph)
