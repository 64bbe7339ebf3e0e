"""The facts of a transformed model as data: what `model.surgery.report()` shows, and what its `to_dict()` returns.

They are gathered by `surgery/report/summarize.py` and laid out by `surgery/report/tables.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from surgery.metadata import Skip
from surgery.report.costs import Traffic
from surgery.report.layers import Repeated
from surgery.report.operations import Gathered, OperationCount, Whole


@dataclass(frozen=True)
class Header:
    """What the report is about."""

    model: str
    num_parameters: int
    dtypes: tuple[str, ...]
    sp_size: int
    mesh: str
    signature: str
    lengths: str
    gradients: str
    on_unknown: str
    bypass: str | None
    other_signatures: tuple[str, ...]


@dataclass(frozen=True)
class SiteRow:
    """One attention call; heads are the most that one rank has (and the fewest), bytes what it sends for each token.

    Of an encoder-decoder they are two numbers: for each token of the source, and of the target.
    """

    path: str
    source_line: str
    num_heads: int
    num_kv_heads: int
    fewest_heads_per_rank: int
    heads_per_rank: int
    fewest_kv_heads_per_rank: int
    kv_heads_per_rank: int
    implementation: str
    mask: str
    forward_bytes_per_token: tuple[int, ...]
    backward_bytes_per_token: tuple[int, ...]
    status: str


@dataclass(frozen=True)
class PassRow:
    """What one pass did. `purpose` is the first clause of its file."""

    name: str
    purpose: str
    changed: int
    elapsed_ms: float
    skips: tuple[Repeated[Skip], ...]


@dataclass(frozen=True)
class OutputRow:
    """An output of the model, its shape on one rank, and its placement."""

    name: str
    dtype: str
    shape: tuple[str, ...]
    placement: str
    is_sharded: bool


@dataclass(frozen=True)
class Summary:
    """Everything the report shows. Without a program (`sp_size` 1) there is only the header."""

    header: Header
    sites: tuple[Repeated[SiteRow], ...] = ()
    traffic: tuple[Traffic, ...] = ()
    outputs: tuple[OutputRow, ...] = ()
    operations: tuple[OperationCount, ...] = ()
    gathered: tuple[Repeated[Gathered], ...] = ()
    whole: tuple[Repeated[Whole], ...] = ()
    passes: tuple[PassRow, ...] = ()
