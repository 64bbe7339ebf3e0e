"""The options of `transform`, checked as one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from surgery.errors import ConfigurationError
from surgery.metadata import Gradients, OnUnknown

CheckInputs = Literal["first", "always", "never"]
Inputs = Literal["whole", "sharded"]
CHOICES: dict[str, Any] = {
    "gradients": Gradients,
    "on_unknown": OnUnknown,
    "check_inputs": CheckInputs,
    "inputs": Inputs,
}


@dataclass(frozen=True)
class Options:
    """How a model is transformed; see `surgery.transform` for what each option means."""

    sp_size: int
    disable_in_eval: bool = False
    gradients: Gradients = "mean"
    on_unknown: OnUnknown = "gather"
    seq_length: int | None = None
    seq_length_is_variable: bool = True
    check_inputs: CheckInputs = "first"
    inputs: Inputs = "whole"

    def __post_init__(self) -> None:
        if not isinstance(self.sp_size, int) or isinstance(self.sp_size, bool) or self.sp_size < 1:
            raise ConfigurationError(
                f"expected sp_size to be a positive integer, found {self.sp_size!r}. Use 1 or more."
            )
        for name, expected in (("disable_in_eval", bool), ("seq_length_is_variable", bool), ("seq_length", int)):
            value = getattr(self, name)
            if value is not None and type(value) is not expected:
                raise ConfigurationError(
                    f"expected {name} to be of type {expected.__name__}, found {value!r}. Pass one."
                )
        for name, choices in CHOICES.items():
            if getattr(self, name) not in get_args(choices):
                words = " or ".join(map(repr, get_args(choices)))
                raise ConfigurationError(f"expected {name} to be {words}, found {getattr(self, name)!r}. Choose one.")
        if self.seq_length is None and not self.seq_length_is_variable:
            raise ConfigurationError("seq_length_is_variable=False needs a length: pass seq_length=... as well.")
        if self.seq_length is not None and self.seq_length < 1:
            raise ConfigurationError(
                f"expected seq_length to be a number of tokens, found {self.seq_length}. Use 1 or more."
            )
