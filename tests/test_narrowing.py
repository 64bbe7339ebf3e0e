"""What is called whole where a trace does not say because of whom it fails: as little as possible, and found soon."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)

from surgery import transform
from surgery.capture.candidates import ModuleClass, outermost_classes, parts_of
from surgery.capture.narrowing import Narrowing
from surgery.capture.opaque import OpaqueModules, UnlearnedError
from surgery.capture.opaque_calls import OpaqueCall
from surgery.errors import CaptureError
from tests.opaque_modules import Blocks, make_opaque
from tests.zoo import make_model

Classes = frozenset[ModuleClass]


def _narrow(holds: Callable[[Classes], bool], unlearnable: ModuleClass | None = None) -> tuple[Any, OpaqueModules, int]:
    """What comes of a model whose trace `holds` where these classes are called whole, and in how many traces."""
    opaque, traces = OpaqueModules(make_model("llama")), []

    def trace(opaque: OpaqueModules) -> Classes:
        called = frozenset(type(module) for _, module in opaque.paths())
        traces.append(called)
        if unlearnable in called:
            raise UnlearnedError(unlearnable, None, {})  # type: ignore[arg-type]
        if not holds(frozenset(opaque.reasons)):
            raise CaptureError("a length is fixed")
        opaque.calls = [OpaqueCall("", kind.__name__, "", None, None) for kind in called]  # type: ignore[arg-type]
        return called

    return Narrowing(opaque, trace, {}, "a length is fixed").run(), opaque, len(traces)


def test_candidates() -> None:
    model = make_model("llama")
    assert outermost_classes(model) == [LlamaRMSNorm, LlamaRotaryEmbedding, LlamaDecoderLayer]
    assert parts_of(model, LlamaDecoderLayer) == [LlamaAttention, LlamaMLP, LlamaRMSNorm]


@pytest.mark.parametrize("needed", [{LlamaMLP}, {LlamaAttention, LlamaRotaryEmbedding}, {LlamaRMSNorm}])
def test_no_more_than_needed(needed: set[ModuleClass]) -> None:
    """A layer stands for all that is in it."""

    def holds(called: Classes) -> bool:
        inside = {part for kind in called for part in parts_of(make_model("llama"), kind)}
        return needed <= called | inside

    found, opaque, _ = _narrow(holds)
    assert found == opaque.reasons.keys() == opaque.called_whole.keys() == needed


def test_a_layer_whose_parts_do_not_help_stays() -> None:
    found, _, _ = _narrow(lambda called: LlamaDecoderLayer in called)
    assert found == {LlamaDecoderLayer}


def test_refused_after_one_trace() -> None:
    found, _, num_traces = _narrow(lambda called: False)
    assert found is None and num_traces == 1


def test_parts_stand_in_for_what_cannot_be_called_whole() -> None:
    found, _, _ = _narrow(lambda called: LlamaMLP in called, unlearnable=LlamaDecoderLayer)
    assert found == {LlamaMLP}


def test_no_trace_for_fewer_than_were_in_vain() -> None:
    """All, without norm, without rotary embedding, and the parts; that nothing at all is too few is known."""
    _, _, num_traces = _narrow(lambda called: LlamaDecoderLayer in called)
    assert num_traces == 4


def test_blocks_of_tokens() -> None:
    """Torch says of them only that the length is fixed, by its guards together."""
    model = transform(make_opaque(Blocks), 4)
    assert [call.path for call in model.surgery.programs[0].context.opaque_calls] == ["model.layers.0.mlp"]
