"""The values of a graph by layer, identical layers once.

    model.layers.{0..31}  x 32    one section
    model.norm, lm_head, ...      another: what lies between and behind the layers

Layers are identical when their lines are equal up to the names of values, and each value they read from outside is
either the very same or comes out of a layer: two layers that attend through different masks are not.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx

from surgery.programs.program import Program
from surgery.report.layers import Layer, fold_path, layer_of
from surgery.report.listing import Line, is_shown, make_line
from surgery.report.notation import Notation, notation_of


@dataclass
class Section:
    """Values of one layer, or of what lies between layers (`layer` None); `indices` are those of identical layers."""

    layer: Layer | None
    nodes: list[fx.Node] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)

    @property
    def title(self) -> str:
        return fold_path(self.layer.stack, self.indices) if self.layer is not None else ""

    def lines(self, notation: Notation) -> list[Line]:
        """The lines of the section, under the graph's own names."""
        return [make_line(node, notation, lambda source: source.name) for node in self.nodes]


@dataclass(frozen=True)
class Body:
    """What makes layers identical: lines with values numbered as they appear, and the values read from outside."""

    lines: tuple[Line, ...]
    outside: tuple[fx.Node, ...]

    def is_like(self, other: Body) -> bool:
        if self.lines != other.lines:
            return False
        pairs = zip(self.outside, other.outside, strict=True)
        return all(own is its or layer_of(own) is not None for own, its in pairs)


def list_sections(program: Program, layer: int | None = None) -> list[Section]:
    """The sections to print: all of them with identical layers folded, or those of one layer."""
    sections = find_sections(program.graph)
    if layer is None:
        return fold_sections(sections, notation_of(program.context))
    return [section for section in sections if section.layer is not None and section.layer.index == layer]


def find_sections(graph: fx.Graph) -> list[Section]:
    """The values of a graph by layer, in order of first appearance."""
    sections: list[Section] = []
    layers: dict[Layer, Section] = {}
    for node in filter(is_shown, graph.nodes):
        layer = layer_of(node)
        if layer is None:
            if not sections or sections[-1].layer is not None:
                sections.append(Section(None))
            sections[-1].nodes.append(node)
            continue
        if layer not in layers:
            layers[layer] = Section(layer, indices=[layer.index])
            sections.append(layers[layer])
        layers[layer].nodes.append(node)
    return sections


def fold_sections(sections: list[Section], notation: Notation) -> list[Section]:
    """Merge each layer into the first one that it is identical to."""
    folded: list[Section] = []
    bodies: list[tuple[Section, Body]] = []
    for section in sections:
        if section.layer is not None:
            body, stack = _body(section, notation), section.layer.stack
            twin = next((s for s, known in bodies if s.layer and s.layer.stack == stack and body.is_like(known)), None)
            if twin is not None:
                twin.indices.append(section.layer.index)
                continue
            bodies.append((section, body))
        folded.append(section)
    return folded


def _body(section: Section, notation: Notation) -> Body:
    names: dict[fx.Node, str] = {}
    lines = tuple(make_line(n, notation, lambda s: names.setdefault(s, f"%{len(names)}")) for n in section.nodes)
    inside = set(section.nodes)
    return Body(lines, tuple(node for node in names if node not in inside))
