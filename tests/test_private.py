"""What is used of torch and transformers beyond their public API: each fails here first when it moves."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import sympy
import torch
import torch.distributed as dist
import transformers
from torch import Tensor, fx, nn
from torch._dynamo.exc import UserError
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.export import Dim
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils._sympy.functions import FloorDiv, Max, Min, Mod, PythonMod
from torch.utils._sympy.symbol import SymT, symbol_is_type
from transformers import AutoModelForSeq2SeqLM
from transformers.exporters.utils import apply_patches
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.import_utils import is_torchdynamo_compiling

import surgery
from surgery import private, transform
from surgery.capture.capture import Known, capture
from surgery.capture.recording_masks import record_mask
from surgery.engines import hooks_of, is_engine_function, original_class
from surgery.inputs.signature import Signature, bind_call
from surgery.private import intercepted_lookup, root_of
from surgery.regions import TOKEN_LOCAL_SUFFIX, TRUSTED_PACKAGE
from surgery.verify.ranks import RankPool
from tests.tracing import trace
from tests.zoo import make_batch, make_config, make_model

SP_SIZE = 4
GUARDED_PACKAGES = ("surgery", "passes")
EXPECTED_PRIVATE = {
    "torch._dynamo",
    "torch._functorch",
    "torch._ops",
    "torch._subclasses",
    "torch.distributed._functional_collectives",
    "torch.distributed.fsdp._fully_shard",
    "torch.utils._python_dispatch",
    "torch.utils._pytree",
    "torch.utils._sympy",
}
"""Every underscored name of torch that the two packages mention; a new one wants a test below."""


def test_no_other_private_name_is_used() -> None:
    root = Path(surgery.__file__).parents[1]
    sources = [path.read_text() for package in GUARDED_PACKAGES for path in sorted((root / package).rglob("*.py"))]
    text = re.sub(r"from (torch[\w.]*) import (_\w+)", r"\1.\2", "\n".join(sources))
    found = set(re.findall(r"(?<![\w.])torch(?:\.[a-z]\w*)*\._[A-Za-z]\w*", text))
    assert {name for name in found if not name.startswith("torch.ops.")} <= EXPECTED_PRIVATE


def _collectives() -> tuple[float, float, float]:
    """The errors of the three collectives and their adjoints, on this rank."""
    rank, group = dist.get_rank(), dist.group.WORLD
    assert group is not None
    name = group.group_name
    x = (torch.arange(SP_SIZE, dtype=torch.float64) + 10 * rank).requires_grad_()
    ranks = torch.arange(SP_SIZE, dtype=torch.float64)

    gathered = private.all_gather_first_dim(x, SP_SIZE, name)
    (scattered,) = torch.autograd.grad(gathered, x, torch.arange(SP_SIZE * SP_SIZE, dtype=torch.float64))
    gather_error = (gathered - (10 * ranks[:, None] + ranks).flatten()).abs().max()
    gather_error += (scattered - SP_SIZE * (SP_SIZE * rank + ranks)).abs().max()

    reduced = private.all_reduce_sum(x, name)
    (spread,) = torch.autograd.grad(reduced, x, torch.full_like(x, rank))
    reduce_error = (reduced - (SP_SIZE * ranks + 60)).abs().max() + (spread - 6).abs().max()

    swapped = private.all_to_all_runs(x, [1] * SP_SIZE, [1] * SP_SIZE, name)
    (returned,) = torch.autograd.grad(swapped, x, torch.full_like(x, rank))
    swap_error = (swapped - (10 * ranks + rank)).abs().max() + (returned - ranks).abs().max()

    to_last = [0] * (SP_SIZE - 1) + [SP_SIZE]
    collected = private.all_to_all_runs(x, to_last, [SP_SIZE * (rank == SP_SIZE - 1)] * SP_SIZE, name)
    (returned,) = torch.autograd.grad(collected, x, torch.arange(collected.numel(), dtype=torch.float64))
    swap_error += (returned - (SP_SIZE * rank + ranks)).abs().max()
    return float(gather_error), float(reduce_error), float(swap_error)


def test_functional_collectives_are_adjoint_pairs(ranks: RankPool) -> None:
    assert ranks.run(_collectives) == [(0.0, 0.0, 0.0)] * SP_SIZE


def test_calls_of_a_module_can_be_replaced_with_its_hooks() -> None:
    layer, called = nn.Linear(2, 2), []
    layer.register_forward_hook(lambda *_: called.append("hook"))
    with private.calls_replaced(layer, lambda x: x + 1):
        assert layer(torch.zeros(1)) == 1
    assert not called
    layer(torch.zeros(2))
    assert called == ["hook"]


def test_operators_have_schemas_and_tags() -> None:
    target = torch.ops.aten.add.Tensor
    assert isinstance(target, torch._ops.OpOverload)
    assert target._schema.name == "aten::add"
    assert [argument.name for argument in target._schema.arguments] == ["self", "other", "alpha"]
    assert target._schema.arguments[2].default_value == 1
    assert not target._schema.is_mutable
    assert torch.Tag.pointwise in target.tags
    assert torch.Tag.nondeterministic_seeded in torch.ops.aten.rand_like.default.tags


def test_higher_order_operators_wrap_blocks() -> None:
    assert torch.ops.higher_order.wrap_with_set_grad_enabled
    assert torch.ops.higher_order.wrap_with_autocast
    assert torch.ops.aten._assert_scalar.default
    assert torch.ops.aten._assert_tensor_metadata.default


class _WithBuffers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.register_buffer("kept", torch.ones(3))
        self.register_buffer("dropped", torch.ones(3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        scaled = x * self.scale * self.get_buffer("kept") * self.get_buffer("dropped")
        return nn.functional.layer_norm(scaled, (3,)) + torch.tensor([1.0, 2.0, 3.0])


def test_export_lifts_parameters_buffers_and_constants_by_name() -> None:
    dynamic = {"x": {0: Dim("batch"), 1: Dim("sequence")}}
    program = torch.export.export(
        _WithBuffers(),
        (),
        {"x": torch.ones(2, 8, 3)},
        dynamic_shapes=dynamic,
        strict=False,
        prefer_deferred_runtime_asserts_over_guards=True,
    )
    targets = {spec.kind: spec.target for spec in program.graph_signature.input_specs}
    assert targets[InputKind.PARAMETER] == "scale"
    assert targets[InputKind.BUFFER] in ("kept", "dropped")
    assert targets[InputKind.CONSTANT_TENSOR] in program.constants
    assert {spec.kind for spec in program.graph_signature.output_specs} == {OutputKind.USER_OUTPUT}
    assert program.call_spec.out_spec is not None
    size = program.graph.find_nodes(op="placeholder")[-1].meta["val"].shape[1]
    assert isinstance(size, torch.SymInt) and size.node.expr.is_Symbol
    assert {"val", "stack_trace"} <= set(_call(program.graph, "layer_norm").meta)


def _call(graph: fx.Graph, name: str) -> fx.Node:
    return next(node for node in graph.nodes if name in node.name)


def test_nodes_know_their_module_and_source() -> None:
    captured = _captured("llama")
    node = _call(captured, "silu")
    path, module_class = next(reversed(node.meta["nn_module_stack"].values()))
    assert path.startswith("model.layers.0.mlp")
    assert "LlamaMLP" in str(module_class) or "SiLU" in str(module_class)
    assert "modeling_llama.py" in node.meta["stack_trace"]


def test_experts_are_named_by_class() -> None:
    stacks = [node.meta.get("nn_module_stack") or {} for node in _captured("mixtral").nodes]
    classes = {str(getattr(c, "__qualname__", c)) for stack in stacks for _, c in stack.values()}
    assert any(name.rsplit(".", 1)[-1].endswith(TOKEN_LOCAL_SUFFIX) for name in classes)
    assert TRUSTED_PACKAGE.startswith(transformers.__name__)


def _captured(name: str) -> fx.Graph:
    with torch.device("meta"):
        model = make_model(name)
    batch = {key: value.to("meta") for key, value in make_batch(2, 16).items()}
    call = bind_call(inspect.signature(model.forward), (), batch)
    signature = Signature(call.kind[0], (), True, None, 0)
    return capture(model, signature, (2, 16), sides=None, known=Known()).graph


def test_export_says_so_when_a_length_is_fixed() -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if int(x.shape[1]) == 8 else x

    with pytest.raises(UserError, match=r"Constraints violated|[Ss]pecializ"):
        torch.export.export(Fixed(), (torch.ones(2, 8),), dynamic_shapes=({1: Dim("sequence")},), strict=False)


def test_sizes_that_depend_on_data_are_told_apart() -> None:
    graph = trace(lambda x: (x > 0).nonzero(), "b s").graph
    given, found = (_call(graph, name).meta["val"].shape[0].node.expr for name in ("x", "nonzero"))
    assert symbol_is_type(found, SymT.UNBACKED_INT)
    assert symbol_is_type(given, SymT.SIZE)


def test_the_names_that_sympy_sizes_have() -> None:
    length = sympy.Symbol("s", integer=True, positive=True)
    for function in (FloorDiv, Mod, PythonMod, Max, Min):
        assert isinstance(function(length, 4), function) and set(function(length, 4).args) == {length, 4}


def test_a_multiple_of_a_dim_knows_it() -> None:
    dim = Dim("k")
    assert all(root_of(each) is dim for each in (dim, 4 * dim, 4 * dim + 1, 4 * dim - 3))


def test_what_torch_finds_of_a_multiple_is_in_the_ranges_alone() -> None:
    """It narrows the range of `k` for the branch, and neither fails nor asserts it in the graph."""

    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.view(x.shape[0] // 4, 4) * (2 if x.shape[0] <= 40 else 1)

    dims = ({0: 4 * Dim("k", min=2)},)
    program = torch.export.export(Branch(), (torch.ones(32),), dynamic_shapes=dims, strict=False)
    (size,) = _call(program.graph, "x").meta["val"].shape
    (root,) = size.node.expr.free_symbols
    assert size.node.expr == 4 * root and program.range_constraints[root].upper == 10


def test_a_trace_and_its_sizes_have_one_shape_env() -> None:
    """By which `surgery/shapes.py` finds what its lengths are called."""
    graph = trace(lambda x: x * 2, "b s").graph
    environments = {_call(graph, name).meta["val"].shape[0].node.shape_env for name in ("x", "mul")}
    assert len(environments) == 1 and weakref.ref(environments.pop())


@pytest.mark.parametrize("registry", [ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS])
def test_registries_shadow_and_restore_entries(registry: Any) -> None:
    original = registry["sdpa"]
    registry["sdpa"] = print
    assert registry["sdpa"] is print
    del registry["sdpa"]
    assert registry["sdpa"] is original
    assert registry.get("no such implementation") is None


def test_mask_functions_take_what_they_are_asked_with() -> None:
    given = set(inspect.signature(sdpa_mask).parameters)
    understood = set(inspect.signature(record_mask).parameters)
    assert {"batch_size", "q_length", "kv_length", "q_offset", "kv_offset", "mask_function", "attention_mask"} <= (
        given & understood
    )
    assert {"allow_is_causal_skip", "allow_is_bidirectional_skip", "device"} <= given


def test_lookups_of_attention_functions_are_intercepted_and_let_go() -> None:
    def own(*args: Any) -> None: ...

    def replaced(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        return print if (name, function) == ("eager", own) else function

    with intercepted_lookup(replaced):
        assert ALL_ATTENTION_FUNCTIONS.get_interface("eager", own) is print
    assert ALL_ATTENTION_FUNCTIONS.get_interface("eager", own) is own


def test_exporter_patches_are_undone() -> None:
    assert importlib.import_module("transformers.exporters.exporter_dynamo")
    before = vars(transformers.masking_utils).copy()
    with apply_patches("dynamo"):
        pass
    assert vars(transformers.masking_utils) == before


def test_output_recorders_are_recognised() -> None:
    module = importlib.import_module("transformers.utils.output_capturing")
    functions = [value for value in vars(module).values() if getattr(value, "__module__", "") == module.__name__]
    assert functions
    assert all(private.is_idle_hook(function) for function in functions if callable(function))
    assert not private.is_idle_hook(lambda *args: None)


def test_configs_hold_their_implementations() -> None:
    config = make_config("mixtral", attn_implementation="sdpa")
    assert config._attn_implementation == "sdpa"
    assert hasattr(config, "_experts_implementation")


def test_copies_in_place_keep_their_gradient() -> None:
    x, y = torch.zeros(2, 3, dtype=torch.float64), torch.ones(3, requires_grad=True)
    private._copy(x, y).sum().backward()
    assert torch.equal(private._copy(x, y), torch.ops.aten.copy(x, y))
    assert torch.equal(y.grad, torch.full((3,), 2.0))  # type: ignore[arg-type]


def _fully_sharded() -> tuple[list[private.FsdpUnit], bool, list[str]]:
    """FSDP2's units, whether all hooks are recognised as its own, and the classes that it has hidden."""
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    fully_shard(model[0], mp_policy=MixedPrecisionPolicy(output_dtype=torch.bfloat16))
    fully_shard(model)
    model(torch.ones(2, 4))
    hooks = [hook for module in (model, model[0]) for hook in hooks_of(module)]
    are_its_own = len(hooks) == 4 and all(map(is_engine_function, hooks))
    return list(private.fsdp_units(model)), are_its_own, [original_class(m).__name__ for m in model.modules()]


def test_fully_shard(ranks: RankPool) -> None:
    for units, are_its_own, classes in ranks.run(_fully_sharded):
        assert units == [private.FsdpUnit("", SP_SIZE, False, False), private.FsdpUnit("0", SP_SIZE, False, True)]
        assert are_its_own
        assert classes == ["Sequential", "Linear", "LayerNorm"]


class Needy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * len(range(x.shape[0])) if x.shape[0] > 1 else x


def test_a_size_needed_as_a_number_is_noticed_where_it_is() -> None:
    with private.refused_specialization(KeyError), pytest.raises(KeyError) as caught:
        torch.export.export(Needy(), (torch.ones(4),), dynamic_shapes=({0: Dim("n")},), strict=False)
    assert any(isinstance(entry.frame.f_locals.get("self"), Needy) for entry in caught.traceback)
    torch.export.export(Needy(), (torch.ones(4),), strict=False)


def test_model_files_ask_by_name_whether_they_are_traced() -> None:
    model = make_model("switch_transformers", auto=AutoModelForSeq2SeqLM)
    file = sys.modules[type(model).__module__]
    with private.told_eager(model), mock.patch.object(torch.compiler, "is_compiling", return_value=True):
        assert not file.is_torchdynamo_compiling()
    assert file.is_torchdynamo_compiling is is_torchdynamo_compiling


def test_fake_tensors_run_modules_of_the_meta_device() -> None:
    mode = private.FakeTensorMode(allow_non_fake_inputs=True)
    with torch.device("meta"):
        layer = nn.Linear(4, 6)
    weight = mode.from_tensor(layer.weight)
    with mode:
        found = torch.randn(3, 4, device="meta") @ weight.T
    assert found.shape == (3, 6) and weight.device.type == "meta"


def test_modules_that_a_model_holds_twice_are_found() -> None:
    """torch.export hands those of such a model out in wrappers, which share what the module has, and names slices."""
    model = make_model("llama", num_hidden_layers=2)
    model.also = model.model.layers[1].self_attn
    transform(model, 2, on_unknown="refuse")
    _, site = model.surgery.programs[0].context.sites
    assert site.call.module_path == site.module_path == "model.layers.1.self_attn"


def test_fake_tensors_are_not_cached_in_a_trace() -> None:
    with private.without_fake_tensor_cache():
        assert not private.FakeTensorMode().cache_enabled
    assert private.FakeTensorMode().cache_enabled
