"""The node that stands for a module's call becomes that call."""

from __future__ import annotations

from dataclasses import replace

import pytest
import sympy
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from passes.call_opaque_modules import CallOpaqueModules
from passes.canonicalize_sizes import CanonicalizeSizes
from passes.inline_blocks import InlineBlocks
from passes.insert_conversions import InsertConversions
from passes.propagate_placements import PropagatePlacements
from surgery.capture.opaque import make_runner
from surgery.capture.opaque_calls import Arguments, OpaqueCall, Results, TensorSpec
from surgery.errors import InputError, UnsupportedOperationError
from surgery.metadata import Skip
from tests.golden import check_golden
from tests.tracing import operate, trace

PREPARED = (InlineBlocks(), CanonicalizeSizes(), PropagatePlacements(), InsertConversions())
FIXED = tuple(map(sympy.Integer, (2, 16, 6)))
CPU = torch.device("cpu")
CALL = OpaqueCall(
    "layers.0.mixer",
    "Mixer",
    "it loops",
    Arguments((TensorSpec(FIXED, torch.float64, CPU), None), pytree.tree_structure(((0, 0), {}))),
    Results((TensorSpec(FIXED, torch.float64, CPU),), pytree.tree_structure(0), is_random=False),
)


def mixed(x: Tensor) -> Tensor:
    scaled = x * 2
    (y,) = torch.ops.surgery.opaque([scaled], 0, [], list(x.shape), [3], ["float64"], x.device)
    return x + y


def test_golden() -> None:
    attempts = (Skip("Mixer", "called whole"),)
    done = operate(
        CallOpaqueModules(), trace(mixed, "b s 6"), prepared_by=PREPARED, opaque_calls=(CALL,), attempts=attempts
    )
    check_golden("call_opaque_modules.txt", str(done))
    assert done.result.changed == 1 and done.result.skips == attempts


def test_leaves_alone_a_graph_without_opaque_modules() -> None:
    done = operate(CallOpaqueModules(), trace(lambda x: x * 2, "b s 6"), prepared_by=PREPARED)
    assert done.result.changed == 0 and done.before == done.after


def test_refuses_modules_on_request() -> None:
    with pytest.raises(UnsupportedOperationError, match=r"Mixer is called whole.*it loops"):
        operate(
            CallOpaqueModules(),
            trace(mixed, "b s 6"),
            prepared_by=PREPARED,
            opaque_calls=(CALL,),
            on_unknown="refuse",
        )


def test_results_of_other_sizes_are_refused() -> None:
    run = make_runner(replace(CALL, path="mixer"))
    (found,) = run(lambda x, _: x[:1], torch.ones(2, 3, 6), sizes=[1, 3, 6])
    assert found.shape == (1, 3, 6)
    with pytest.raises(InputError, match=r"mixer returned tensors of sizes \[\[1, 3, 6\]\]"):
        run(lambda x, _: x[:1], torch.ones(2, 3, 6), sizes=[2, 3, 6])
