"""`surgery inspect NAME_OR_CONFIG_OR_DIR`: what sequence parallelism would do to a model, without its weights or a GPU.

    surgery inspect meta-llama/Llama-3.1-8B --sp-size 8     a hub name: only its configuration is read
    surgery inspect ./checkpoint --layer 3                  a directory with config.json, or the file itself
    surgery inspect llama --json                            a model type, with its default configuration

Exit codes: 0 the model can be transformed, 1 it is refused (the reason is on stderr), 2 wrong usage.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from rich.console import Console
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from surgery.api import transform
from surgery.errors import ConfigurationError, SurgeryError
from surgery.metadata import OnUnknown
from surgery.model_surgery import ModelSurgery
from surgery.printing import GraphPrintout
from surgery.report import Report

FINE, REFUSED = 0, 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; wrong usage raises `SystemExit(2)`."""
    arguments = _parser().parse_args(argv)
    console = Console(stderr=True)
    try:
        with console.status(f"Reading the configuration of {arguments.model}") as status:
            model = build_on_meta(load_config(arguments.model))
            status.update(f"Capturing {type(model).__name__} for {arguments.sp_size} ranks")
            transform(model, arguments.sp_size, on_unknown=arguments.on_unknown, seq_length=arguments.seq_length)
        assert isinstance(model.surgery, ModelSurgery)
        shown = choose(model.surgery, layer=arguments.layer, has_graph=arguments.graph)
    except SurgeryError as error:
        console.print(f"refused: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return REFUSED
    if arguments.json:
        print(json.dumps(shown.to_dict(), indent=2))
    else:
        Console().print(shown)
    return FINE


def load_config(source: str) -> Any:
    """The configuration behind a hub name, a directory, a config.json, or a model type."""
    try:
        if source in CONFIG_MAPPING and not Path(source).exists():
            return AutoConfig.for_model(source)
        return AutoConfig.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigurationError(
            f"expected a hub name, a directory, a config.json or a model type such as llama, found {source!r}, "
            f"which transformers cannot read: {str(error).splitlines()[0]}"
        ) from error


def build_on_meta(config: Any) -> nn.Module:
    """A model in training mode without memory for its weights."""
    try:
        with torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        raise ConfigurationError(
            f"expected a causal language model, found {type(config).__name__}: {str(error).splitlines()[0]}"
        ) from error
    return model.train()


def choose(surgery: ModelSurgery, *, layer: int | None, has_graph: bool) -> Report | GraphPrintout:
    """The graph or a layer of it if asked for, the report otherwise."""
    return surgery.graph(layer) if has_graph or layer is not None else surgery.report()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="surgery", description="Sequence-parallel surgery on Hugging Face models.")
    commands = parser.add_subparsers(required=True, metavar="command")
    inspect = commands.add_parser(
        "inspect",
        help="show what would be done to a model",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = inspect.add_argument
    add("model", metavar="NAME_OR_CONFIG_OR_DIR", help="hub name, directory, config.json or model type")
    add("--sp-size", type=_positive, default=8, metavar="P", help="ranks that share a sequence (default: 8)")
    add("--seq-length", type=_positive, metavar="S", help="length to capture with (default: 64)")
    add("--on-unknown", choices=get_args(OnUnknown), default="gather", help="what to do where tokens mix")
    add("--graph", action="store_true", help="print the rewritten graph, identical layers once")
    add("--layer", type=int, metavar="N", help="print layer N of the rewritten graph in full detail")
    add("--json", action="store_true", help="print the same facts as JSON")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, found {number}")
    return number
