"""Writes to buffers: left out where the buffer is no state, as longrope's frequencies are, refused elsewhere.

self.inv_freq = f(position_ids)         not saved, written before it is read, follows from the inputs    left out
self.steps += 1                         read before it is written: state                                 refused
self.mean.copy_(hidden.mean())          tells of the model: each rank would keep another                 refused
"""

from __future__ import annotations

from typing import Any

from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from surgery.capture.exporting import specs_by_name
from surgery.errors import CaptureError


def drop_buffer_writes(program: ExportedProgram, *, may_be_read: bool) -> None:
    """Leave out writes to buffers that are no state; refuse all others.

    Such a buffer is not saved, and is written anew in every call, before it is read: what is read is in the graph. It
    follows from the inputs alone, so it tells nobody of the model's values. `may_be_read`: by modules called live.
    """
    signature, output = program.graph_signature, next(iter(program.graph.find_nodes(op="output")))
    outputs: Any = list(zip(signature.output_specs, output.args[0], strict=True))
    unread = {node.name for node in program.graph.find_nodes(op="placeholder") if not node.users and not may_be_read}
    inputs = specs_by_name(program)
    scratch = {spec.target for name, spec in inputs.items() if not spec.persistent and name in unread}
    learnt = {name for name, spec in inputs.items() if spec.kind is InputKind.PARAMETER}
    for spec, value in outputs:
        is_scratch = spec.kind is OutputKind.BUFFER_MUTATION and spec.target in scratch
        if spec.kind is not OutputKind.USER_OUTPUT and not (is_scratch and learnt.isdisjoint(_sources(value))):
            raise CaptureError(
                f"the forward writes to {spec.target}, a buffer or input. Expected a forward that only computes: "
                "ranks would keep different copies. Remove the buffer update, or run it outside the forward."
            )
    output.args = (tuple(value for spec, value in outputs if spec.kind is OutputKind.USER_OUTPUT),)


def _sources(node: fx.Node) -> set[str]:
    """The names of the values that `node` was computed from."""
    found: set[str] = set()
    waiting = [node]
    while waiting:
        sources = [source for source in waiting.pop().all_input_nodes if source.name not in found]
        found.update(source.name for source in sources)
        waiting += sources
    return found
