"""What a graph was captured for: the inputs that are present, their dtypes and ranks, and the model's mode."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from surgery.errors import InputError

SEQUENCES = {
    "s": ("input_ids", "inputs_embeds"),
    "t": ("decoder_input_ids", "decoder_inputs_embeds", "labels"),
}
"""The arguments that tell the length of the sequence (an encoder's, if there is a decoder), and of the decoder's."""
SMALLEST = 2
"""The smallest size that varies from call to call: torch.export fixes ones."""
SHORTEST = {"s": SMALLEST, "t": 3}
"""The same of a sequence beside another: labels that are shifted for a decoder lose a token."""
SCALAR_INPUTS = frozenset({"num_items_in_batch", "max_length_q", "max_length_k"})
COUNTED_INPUTS = frozenset({"cu_seq_lens_q", "cu_seq_lens_k"})
"""Inputs of one dimension that has its own length on every call: the ends of documents, of which there are many."""
SAMPLE_INPUTS = frozenset({"labels", "start_positions", "end_positions", "next_sentence_label", "sentence_order_label"})
"""Arguments that may have one number for each sequence of the batch: [B]."""
CACHES = ("past_key_values", "cache")
"""Arguments that are a key-value cache; transformers 5.24 renamed it."""
IMAGE_PREFIX = "pixel_values"
"""How the names of images and videos begin."""
FEATURES = ("inputs_embeds", "hidden_states")
"""How the names of [B, S, H] end, whose H is no length."""
FIXED_INPUTS = (IMAGE_PREFIX, "input_features", "input_values")
"""Images and sound: their sizes are no lengths of token sequences, whatever they happen to be."""


class TensorInput(NamedTuple):
    """A tensor argument; `dims`: the batch "b", a sequence "s" or a decoder's "t", any count "n", or a fixed size."""

    name: str
    dtype: torch.dtype
    device: torch.device
    dims: tuple[str | int, ...]


TensorInputs = tuple[TensorInput, ...]
Constants = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Signature:
    """The key of a captured graph. `state` fingerprints the model: mode, modules, parameter shapes and dtypes."""

    tensors: TensorInputs
    constants: Constants
    is_training: bool
    autocast_dtype: torch.dtype | None
    state: int

    @property
    def letters(self) -> tuple[str, ...]:
        """The sequences that vary in length, the leading one first: "s" and "t"."""
        dims = {dim for tensor in self.tensors for dim in tensor.dims}
        return tuple(letter for letter in SEQUENCES if letter in dims)

    def __str__(self) -> str:
        names = [tensor.name for tensor in self.tensors] + [f"{name}={value!r}" for name, value in self.constants]
        return f"{'train' if self.is_training else 'eval'}({', '.join(names)})"


@dataclass(frozen=True)
class BoundCall:
    """The arguments of one call of the model: tensors by name, constants by name, and its batch and sequence sizes.

    `lengths` holds the length of each of its sequences: "s", and "t" where it is an encoder-decoder's call.
    """

    tensors: dict[str, Tensor]
    constants: dict[str, Any]
    batch_size: int
    lengths: dict[str, int]

    @property
    def length(self) -> int:
        """The length of the leading sequence."""
        return next(iter(self.lengths.values()))

    @property
    def sizes(self) -> tuple[int, ...]:
        """The batch size and the lengths."""
        return self.batch_size, *varying(self.lengths).values()

    @property
    def plain_sizes(self) -> tuple[int, ...]:
        """`sizes` as plain numbers, which a graph is captured with; of `int(size)` Dynamo would make a symbol again."""
        return tuple(operator.index(size) for size in self.sizes)

    @property
    def kind(self) -> tuple[TensorInputs, Constants]:
        """What a graph is captured for: the tensors, in the order in which the graph takes them, and the constants."""
        tensors = (
            describe_tensor(name, self.tensors[name], self.batch_size, self.lengths) for name in sorted(self.tensors)
        )
        return tuple(tensors), tuple((name, self.constants[name]) for name in sorted(self.constants))


def has_cache(kwargs: Mapping[str, Any]) -> bool:
    """Whether a call keeps keys and values for the next one: in a cache of its own, or in a given one."""
    return bool(kwargs.get("use_cache")) or any(kwargs.get(name) is not None for name in CACHES)


def has_images(call: BoundCall) -> bool:
    """Whether a call has images or videos, by the start of their names."""
    return any(name.startswith(IMAGE_PREFIX) for name in call.tensors)


def bind_call(parameters: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> BoundCall:
    """Sort a call's arguments into tensors and constants; arguments that are None are as if not given."""
    try:
        bound = parameters.bind(*args, **kwargs).arguments
    except TypeError as error:
        raise InputError(f"the model's forward cannot take these arguments: {error}") from error
    given = {name: value for name, value in unpack_keywords(parameters, bound).items() if value is not None}
    tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    for name in SCALAR_INPUTS & given.keys() - tensors.keys():
        tensors[name] = torch.tensor(given[name])
    constants = {name: value for name, value in given.items() if name not in tensors and name != "use_cache"}
    _check_constants(constants)
    if "encoder_outputs" in given:
        raise InputError(
            "encoder_outputs: the captured graph runs the encoder itself. Expected the encoder's input_ids. "
            "Call restore(model) to pass what another encoder computed."
        )
    sequences = find_sequences(tensors, has_decoder="decoder_input_ids" in parameters.parameters)
    if not sequences:
        raise InputError(
            "expected a batch of token sequences as one of input_ids, inputs_embeds, decoder_input_ids, of shape "
            f"[B, S] or [B, S, H]; found {', '.join(sorted(given)) or 'no arguments'}. "
            "Pass the whole batch on every rank."
        )
    return BoundCall(
        tensors,
        constants,
        next(iter(sequences.values())).shape[0],
        {letter: tensor.shape[sequence_dim(tensor)] for letter, tensor in sequences.items()},
    )


def unpack_keywords(parameters: inspect.Signature, bound: Mapping[str, Any]) -> dict[str, Any]:
    """Bound arguments by name, those that a forward collects in `**kwargs` among them."""
    collected = {name for name, each in parameters.parameters.items() if each.kind is inspect.Parameter.VAR_KEYWORD}
    named = {name: value for name, value in bound.items() if name not in collected}
    return {**named, **{key: value for name in collected for key, value in bound.get(name, {}).items()}}


def _check_constants(constants: Mapping[str, Any]) -> None:
    """Refuse what a graph would keep as it was on the first call, although it may be another on the next."""
    for name, value in constants.items():
        if name not in CACHES and _is_changeable(value):
            raise InputError(
                f"{name}: a {type(value).__name__}, whose contents the captured graph would keep as they were on the "
                "first call. Expected tensors, numbers, words, or tuples of numbers and words. Pass one of those, or "
                "call restore(model) to run the unsharded model."
            )


def _is_changeable(value: Any) -> bool:
    """Whether a value that is no tensor holds tensors, or may hold others on the next call."""
    if isinstance(value, tuple):
        return any(isinstance(item, Tensor) or _is_changeable(item) for item in value)
    return not isinstance(value, Hashable)


def find_sequences(tensors: Mapping[str, Tensor], *, has_decoder: bool) -> dict[str, Tensor]:
    """The tensor that tells the length of each sequence of a call, the encoder's first.

    Labels belong to the decoder of a model that has one, and tell its length where they are all it is given.
    """
    found = {}
    for letter, names in SEQUENCES.items():
        given = [tensors[name] for name in names if name in tensors and tensors[name].ndim > 1]
        given = [tensor for tensor in given if not (tensor is tensors.get("labels") and tensor.is_floating_point())]
        if given and (letter == "s" or has_decoder):
            found[letter] = given[0]
    return found


def varying(lengths: Mapping[str, int]) -> dict[str, int]:
    """Those of a call's lengths that vary from call to call; shorter ones get a signature each."""
    is_alone = lengths.get("s", 1) < SHORTEST["s"]
    return {letter: n for letter, n in lengths.items() if n >= shortest(letter, is_alone=is_alone)}


def shortest(letter: str, *, is_alone: bool) -> int:
    """The shortest length of a sequence that varies, beside another one or alone."""
    return SMALLEST if is_alone else SHORTEST[letter]


def sequence_dim(tensor: Tensor) -> int:
    """Where tokens lie: [B, S] ids, [B, S, H] embeddings, [B, choices, S] ids of a multiple choice."""
    return 1 if tensor.is_floating_point() else tensor.ndim - 1


def describe_tensor(name: str, tensor: Tensor, batch_size: int, lengths: Mapping[str, int]) -> TensorInput:
    """Which of a tensor's dimensions vary from call to call. Whose length a dimension is, its argument's name says.

    A batch of one is a signature of its own: models may branch on it, and torch.export takes any other for two or more.
    The same goes for sequences that are too short to vary.
    """
    if name in COUNTED_INPUTS and tensor.ndim == 1:
        return TensorInput(name, tensor.dtype, tensor.device, ("n",))
    letter = "t" if "t" in lengths and (name.startswith("decoder_") or name == "labels") else "s"
    length = None if name.startswith(FIXED_INPUTS) else lengths.get(letter)
    is_fixed = letter not in varying(lengths)
    dims: list[str | int] = [int(size) if size != length or is_fixed else letter for size in tensor.shape]
    is_sample = tensor.ndim == 1 and name in SAMPLE_INPUTS
    if tensor.ndim > 1 or is_sample:
        is_of_axes = name == "position_ids" and tensor.ndim > 2 and tensor.shape[1] in (1, batch_size)
        batch_dim = 1 if is_of_axes else 0  # [3, B, S], or [B, choices, S] of a multiple choice
        dims[0] = int(tensor.shape[0])
        dims[batch_dim] = "b" if tensor.shape[batch_dim] == batch_size and batch_size > 1 else dims[batch_dim]
    if tensor.is_floating_point() and name.endswith(FEATURES):
        dims[-1] = int(tensor.shape[-1])
    if tensor.ndim == 4:  # a mask [B, N, S, S] of as many heads as tokens
        dims[1] = int(tensor.shape[1])
    return TensorInput(name, tensor.dtype, tensor.device, tuple(dims))


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype that autocast casts to on a device, or None where it is off."""
    is_on = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
    return torch.get_autocast_dtype(device_type) if is_on else None
