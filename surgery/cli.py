"""The command line, which needs neither weights nor a GPU.

    surgery inspect MODEL --sp-size 8     what sequence parallelism would do to a model, its graph and its costs
    surgery verify MODEL --sp-size 2      whether it computes the model's numbers: run here, shrunk, on P processes
    surgery sweep                         the same for every text architecture of the installed transformers

MODEL is a hub name, of which only the configuration is read, a directory with config.json, the file itself, or a model
type such as llama, with its default configuration.

Exit codes: 0 fine (verify: exact), 1 refused (the reason is shown), 2 wrong usage, 3 verified, and wrong or failed.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig

from surgery.api import transform
from surgery.errors import ConfigurationError, SurgeryError
from surgery.metadata import OnUnknown
from surgery.model_surgery import ModelSurgery
from surgery.report.printing import GraphPrintout
from surgery.report.report import Report
from surgery.verify.batches import KINDS
from surgery.verify.catalog import find_architecture, list_architectures
from surgery.verify.coverage import coverage_page, verdict_of
from surgery.verify.sweep import read_rows, sweep, write_rows
from surgery.verify.verify import verify

FINE, REFUSED = 0, 1
Run = Callable[[argparse.Namespace, Console], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; wrong usage raises `SystemExit(2)`."""
    arguments = _parser().parse_args(argv)
    console = Console(stderr=True)
    try:
        return int(arguments.run(arguments, console))
    except SurgeryError as error:
        console.print(f"refused: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return REFUSED


def run_inspect(arguments: argparse.Namespace, console: Console) -> int:
    """`surgery inspect`: transform on the meta device, print the report or the graph."""
    with console.status(f"Reading the configuration of {arguments.model}") as status:
        model = build_on_meta(load_config(arguments.model))
        status.update(f"Capturing {type(model).__name__} for {arguments.sp_size} ranks")
        transform(model, arguments.sp_size, on_unknown=arguments.on_unknown, seq_length=arguments.seq_length)
    assert isinstance(model.surgery, ModelSurgery)
    shown = choose(model.surgery, layer=arguments.layer, has_graph=arguments.graph)
    _show(shown, is_json=arguments.json)
    return FINE


def run_verify(arguments: argparse.Namespace, console: Console) -> int:
    """`surgery verify`: one trial for each kind of input, under a progress bar."""
    config = load_config(arguments.model)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(
            f"Running {config.model_type} whole and on {arguments.sp_size} ranks", total=len(KINDS)
        )
        found = verify(config, arguments.sp_size, lambda kind: progress.advance(task), device=arguments.device)
    _show(found, is_json=arguments.json)
    return found.exit_code


def run_sweep(arguments: argparse.Namespace, console: Console) -> int:
    """`surgery sweep`: try what has no result yet, and write the page."""
    chosen = [each for each in list_architectures() if re.search(arguments.only, each.class_name)]
    arguments.out.mkdir(parents=True, exist_ok=True)
    results = arguments.out / "coverage.jsonl"
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("Sweeping", total=len(chosen))
        options = {"again": arguments.again, "device": arguments.device}
        for row in sweep(results, chosen, arguments.sp_size, arguments.inputs, **options):
            progress.console.print(f"{row.architecture.class_name}: {verdict_of(row)}", highlight=False)
            progress.advance(task)
    rows = read_rows(results)
    write_rows(results, rows)
    (arguments.out / "coverage.md").write_text(coverage_page(rows, arguments.sp_size))
    return FINE


def _show(shown: Any, *, is_json: bool) -> None:
    if is_json:
        print(json.dumps(shown.to_dict(), indent=2))
    else:
        Console().print(shown)


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
    architecture = find_architecture(config)
    with torch.device("meta"):
        return architecture.make(architecture.as_decoder(config)).train()


def choose(surgery: ModelSurgery, *, layer: int | None, has_graph: bool) -> Report | GraphPrintout:
    """The graph or a layer of it if asked for, the report otherwise."""
    return surgery.graph(layer) if has_graph or layer is not None else surgery.report()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="surgery", description="Sequence-parallel surgery on Hugging Face models.")
    commands = parser.add_subparsers(required=True, metavar="command")
    _add_inspect(_command(commands, "inspect", "show what would be done to a model", run_inspect))
    _add_verify(_command(commands, "verify", "prove that a model computes the same numbers", run_verify))
    _add_sweep(_command(commands, "sweep", "verify every text architecture of transformers", run_sweep))
    return parser


def _command(commands: Any, name: str, purpose: str, run: Run) -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    command: argparse.ArgumentParser = commands.add_parser(name, help=purpose, description=__doc__, formatter_class=raw)
    command.set_defaults(run=run)
    return command


def _add_inspect(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("model", metavar="NAME_OR_CONFIG_OR_DIR", help="hub name, directory, config.json or model type")
    add("--sp-size", type=_positive, default=8, metavar="P", help="ranks that share a sequence (default: 8)")
    add("--seq-length", type=_positive, metavar="S", help="length to capture with (default: 64)")
    add("--on-unknown", choices=get_args(OnUnknown), default="gather", help="what to do where tokens mix")
    add("--graph", action="store_true", help="print the rewritten graph, identical layers once")
    add("--layer", type=int, metavar="N", help="print layer N of the rewritten graph in full detail")
    add("--json", action="store_true", help="print the same facts as JSON")


def _add_verify(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("model", metavar="NAME_OR_CONFIG_OR_DIR", help="hub name, directory, config.json or model type")
    add("--sp-size", type=_positive, default=2, metavar="P", help="processes to run it on (default: 2)")
    _add_device(add)
    add("--json", action="store_true", help="print the same facts as JSON")


def _add_sweep(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--sp-size", type=_positive, default=2, metavar="P", help="ranks that share a sequence (default: 2)")
    _add_device(add)
    add("--inputs", nargs="+", choices=KINDS, default=["uneven"], metavar="KIND", help="kinds of input to try")
    add("--only", default="", metavar="REGEX", help="classes to try")
    add("--again", default=None, metavar="REGEX", help="outcomes to try again, such as refused")
    add(
        "--out", type=Path, default=Path("docs"), metavar="DIR", help="where coverage.md and .jsonl are (default: docs)"
    )


def _add_device(add: Callable[..., Any]) -> None:
    add("--device", type=_usable_device, default="cpu", help="what all ranks compute on, such as cuda (default: cpu)")


def _usable_device(text: str) -> str:
    try:
        torch.zeros(1, device=text).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(
            f"expected a device that torch can use here, found {text}: {reason}"
        ) from error
    return text


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, found {number}")
    return number
