"""Images: the model's own code makes embeddings of them, live and whole on every rank, in front of the graph.

    pixel_values ── vision tower ── features ──┐
    input_ids [B, S] ── embedding ── [B, S, H] ┴─ scattered ── inputs_embeds [B, S, H] ── the graph: a slice, layers

A vision tower loops over images and over the values of their grids, which no trace can follow, and each image has a
number of tokens of its own: nothing of that is in the graph, which serves images of all sizes. The forward is stopped
where it calls the decoder. A rank's gradient of `inputs_embeds` is an addend, and so is what a backward makes of it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from surgery.inputs.signature import (
    COUNTED_INPUTS,
    IMAGE_PREFIX,
    SAMPLE_INPUTS,
    SCALAR_INPUTS,
    BoundCall,
    Constants,
    Signature,
    TensorInputs,
    bind_call,
    describe_tensor,
    has_images,
    unpack_keywords,
)
from surgery.private import calls_replaced

NO_CACHE = {"use_cache": False}
BATCH_INPUTS = SCALAR_INPUTS | COUNTED_INPUTS | SAMPLE_INPUTS
"""Arguments without a dimension for the tokens."""
Kind = tuple[TensorInputs, Constants, bool]
"""What is the same for all calls of a signature: tensors, constants, the model's mode."""


class UnmergedError(Exception):
    """Why a call cannot be told by embeddings: its images have to go into the graph."""


class _ReachedDecoder(Exception):  # noqa: N818  (no error: where the forward is stopped)
    def __init__(self, arguments: dict[str, Any]) -> None:
        self.arguments = arguments


class ImageMerger:
    """Makes embeddings of the images of a model's calls, and remembers which kinds of calls have to do without."""

    def __init__(self, model: nn.Module, forward: Callable[..., Any]) -> None:
        self.model = model
        self.forward = forward
        self._merged: set[Kind] = set()
        self._unmerged: dict[Kind, str] = {}

    def merge(self, call: BoundCall) -> BoundCall:
        """The call with its images merged, or as it is where it has none, or where they have to go into the graph."""
        if not has_images(call):
            return call
        kind = (*call.kind, self.model.training)
        if kind in self._unmerged:
            return call
        try:
            merged = merge_images(self.model, self.forward, call, is_checked=kind not in self._merged)
        except UnmergedError as error:
            self._unmerged[kind] = str(error)
            return call
        self._merged.add(kind)
        return merged

    def why_unmerged(self, signature: Signature) -> str | None:
        """Why the images of such calls are in the graph; None where they have none, or are merged."""
        return self._unmerged.get((signature.tensors, signature.constants, signature.is_training))


def merge_images(model: Any, forward: Callable[..., Any], call: BoundCall, *, is_checked: bool) -> BoundCall:
    """The same call with `inputs_embeds` [B, S, H] for its ids and images, and with the positions the model made.

    `is_checked`: see that the decoder is called alike for both. Raises `UnmergedError` where it is not.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") and "t" not in call.lengths else None
    if decoder is None or decoder is model:
        raise UnmergedError("it has no decoder of its own")
    parameters = inspect.signature(forward)
    constants = {**call.constants, **{name: value for name, value in NO_CACHE.items() if name in parameters.parameters}}
    reached = find_decoder_call(model, forward, {**call.tensors, **constants})
    if not isinstance(reached.get("inputs_embeds"), Tensor):
        raise UnmergedError("its decoder is not called with inputs_embeds")
    made = {name: reached[name] for name in ("inputs_embeds", "position_ids") if isinstance(reached.get(name), Tensor)}
    merged = bind_call(parameters, (), {**_of_tokens(call), **made, **call.constants})
    if is_checked:
        again = find_decoder_call(model, forward, {**merged.tensors, **constants})
        unlike = sorted(name for name in reached.keys() | again.keys() if not _is_alike(reached, again, name))
        if unlike:
            raise UnmergedError(f"its decoder is given more of the images than embeddings: {', '.join(unlike)}")
    return merged


def find_decoder_call(model: Any, forward: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with which `forward(**given)` of `model` first calls its decoder; {} if it never does."""
    decoder: nn.Module = model.get_decoder()

    def stop(*args: Any, **kwargs: Any) -> NoReturn:
        parameters = inspect.signature(decoder.forward)
        raise _ReachedDecoder(unpack_keywords(parameters, parameters.bind(*args, **kwargs).arguments))

    try:
        with _forgetting(model), calls_replaced(decoder, stop):
            forward(**given)
    except _ReachedDecoder as reached:
        return reached.arguments
    return {}


@contextmanager
def _forgetting(model: nn.Module) -> Iterator[None]:
    """Take back the tensors that a forward notes on its modules (qwen's offsets of positions, for decoding).

    A graph bakes such a tensor in, and would be captured anew for each.
    """
    before = [(module, dict(vars(module))) for module in model.modules()]
    try:
        yield
    finally:
        for module, attributes in before:
            noted = {name for name, value in vars(module).items() if isinstance(value, Tensor)}
            vars(module).update({name: attributes[name] for name in noted & attributes.keys()})


def _of_tokens(call: BoundCall) -> dict[str, Tensor]:
    """The tensors that say something of tokens or of the whole batch; the ids and images are told by embeddings."""
    dims = {name: describe_tensor(name, x, call.batch_size, call.lengths).dims for name, x in call.tensors.items()}
    return {
        name: tensor
        for name, tensor in call.tensors.items()
        if name != "input_ids" and not name.startswith(IMAGE_PREFIX) and ("s" in dims[name] or name in BATCH_INPUTS)
    }


def _is_alike(first: Mapping[str, Any], second: Mapping[str, Any], name: str) -> bool:
    """Whether both calls have the same argument. Masks drawn in full never are: a graph need not draw them."""
    one, other = first.get(name), second.get(name)
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one is other or (one.ndim < 4 and one.shape == other.shape and torch.equal(one, other))
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_is_alike(one, other, key) for key in one)
    return not isinstance(one, Tensor) and not isinstance(other, Tensor) and bool(one == other)
