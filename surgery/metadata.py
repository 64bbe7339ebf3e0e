"""What passes know about a graph, as typed records: one on every node, one for the whole graph.

Shapes stay in `node.meta["val"]`, and are those of the whole (unsharded) value; the placement says what a rank holds.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import sympy
from torch import fx

from surgery.attention.recorded import RecordedCall, RecordedMask
from surgery.axis import Axis
from surgery.capture.opaque_calls import OpaqueCall
from surgery.exchange.head_plan import HeadPlan
from surgery.exchange.row_plan import RowPlan
from surgery.placement import REPLICATED, Placement
from surgery.rules.call import Step
from surgery.shapes import Lengths

KEY = "surgery"
RECORDER = "surgery/capture/opaque.py"  # stands in the place of model code while it is traced

OnUnknown = Literal["gather", "refuse"]
Gradients = Literal["mean", "sum"]


@dataclass
class NodeFacts:
    """What is known of one node. `placements` has one entry a result; `family` is the rule's, or how it was handled."""

    placements: tuple[Placement, ...] = (REPLICATED,)
    family: str = "replicated"
    step: Step | None = None
    reason: str = ""

    @property
    def placement(self) -> Placement:
        return self.placements[0]


def facts_of(node: fx.Node) -> NodeFacts:
    """The facts of `node`, made on first use."""
    facts = node.meta.setdefault(KEY, NodeFacts())
    assert isinstance(facts, NodeFacts)
    return facts


@dataclass(frozen=True)
class Mask:
    """What an attention call may see, in O(S) words.

    `is_causal`: keys behind the query. `window`: at most so many tokens back; `reach`: at most so many away;
    `chunk_size`: in the same run of so many tokens. `padding` [B, S] bool, `documents` and `blocks` [B, S] int are
    names of graph values; the tokens of a block see each other besides. None everywhere: all tokens see all tokens.
    """

    is_causal: bool
    window: int | None = None
    padding: str | None = None
    documents: str | None = None
    reach: int | None = None
    chunk_size: int | None = None
    blocks: str | None = None

    def __str__(self) -> str:
        words = ["causal" if self.is_causal else "bidirectional"]
        words += [f"window {self.window}"] if self.window is not None else []
        words += [f"reach {self.reach}"] if self.reach is not None else []
        words += [f"chunks of {self.chunk_size}"] if self.chunk_size is not None else []
        words += ["padding"] if self.padding is not None else []
        words += ["documents"] if self.documents is not None else []
        words += ["blocks"] if self.blocks is not None else []
        return ", ".join(words)


@dataclass
class Site:
    """One attention call. Sizes are of the whole model: `num_heads` N, `num_kv_heads` Nk, head sizes H.

    `shares_rows`: of more ranks than heads, those of one head share its queries. `is_broadcast`: the model leaves it to
    torch to broadcast its one key head.
    """

    node: fx.Node
    module_path: str
    source_line: str
    num_heads: int
    num_kv_heads: int
    head_size: int
    value_head_size: int
    element_size_bytes: int
    dropout: float
    mask: Mask | None = None
    call: RecordedCall | None = None
    shares_rows: bool = False
    is_broadcast: bool = False

    @property
    def implementation(self) -> str:
        """The name of what runs: what the model asks for, or sdpa where the model calls that itself."""
        return self.call.implementation if self.call is not None else "sdpa"

    def plan(self, sp_size: int) -> HeadPlan | RowPlan:
        """Which rank attends with which heads, and rows of them."""
        return (RowPlan if self.shares_rows else HeadPlan)(self.num_heads, self.num_kv_heads, sp_size)


@dataclass(frozen=True)
class Skip:
    """A pass's explained refusal to act on something."""

    where: str
    reason: str


@dataclass(frozen=True)
class PassRecord:
    """What one pass did to one graph."""

    name: str
    changed: int
    elapsed_ms: float
    skips: tuple[Skip, ...] = ()


@dataclass
class Context:
    """What all passes over one graph share: the mesh axis, the options, the sequences, and the facts found so far.

    `lengths` are those of the model's sequences, the leading one first: the encoder's S, then the decoder's T; `batch`
    is None where a graph is for a batch of one. `sizes`: the one node that reads each. `assumptions`: conditions on
    sizes under which the graph holds, checked on every call. `calls`, `masks`, `opaque_calls`: what the capture wrote
    down; `attempts`: what it tried in vain. `facts`: the claims of the passes so far, which others require.
    """

    axis: Axis
    lengths: Lengths
    batch: sympy.Symbol | None
    sizes: dict[sympy.Symbol, fx.Node]
    fixed_length: int | None = None
    on_unknown: OnUnknown = "gather"
    gradients: Gradients = "mean"
    has_document_ends: bool = False
    calls: list[RecordedCall] = field(default_factory=list)
    masks: list[RecordedMask] = field(default_factory=list)
    sites: list[Site] = field(default_factory=list)
    assumptions: list[sympy.Basic] = field(default_factory=list)
    opaque_calls: tuple[OpaqueCall, ...] = ()
    attempts: tuple[Skip, ...] = ()
    facts: set[str] = field(default_factory=set)
    records: list[PassRecord] = field(default_factory=list)

    @property
    def length(self) -> sympy.Symbol:
        """The length of the leading sequence."""
        return self.lengths[0]


def module_path(node: fx.Node) -> str:
    """The dotted path of the innermost module that `node` was traced in, or "" at the top."""
    stack = node.meta.get("nn_module_stack") or {}
    return str(next(reversed(stack.values()))[0]) if stack else ""


def module_class(node: fx.Node) -> str:
    """The class name of the innermost module that `node` was traced in, or "" outside all."""
    stack = node.meta.get("nn_module_stack") or {}
    traced = next(reversed(stack.values()))[1] if stack else ""
    return str(getattr(traced, "__qualname__", traced)).rsplit(".", 1)[-1]


def source_line(node: fx.Node) -> str:
    """`file.py:123` of the model code that made `node`, or "" if unknown."""
    lines = (node.meta.get("stack_trace") or "").splitlines()
    frames = [line for line in lines if line.startswith('  File "') and RECORDER not in line and 'File "<' not in line]
    if not frames:
        return ""
    path, line = frames[-1].split('"')[1], frames[-1].split(",")[1].strip().removeprefix("line ")
    return f"{path.rsplit('/', 1)[-1]}:{line}"


def where(node: fx.Node) -> str:
    """`aten.cumsum at model.layers.0.mlp (modeling.py:12)`, for messages."""
    place = " ".join(
        part for part in (module_path(node), f"({source_line(node)})" if source_line(node) else "") if part
    )
    return f"{node.target} at {place or 'the top of the model'}"
