"""The default recipe: which passes make a captured graph sequence-parallel, in which order."""

from __future__ import annotations

from passes.call_opaque_modules import CallOpaqueModules
from passes.canonicalize_sizes import CanonicalizeSizes
from passes.extract_assumptions import ExtractAssumptions
from passes.inline_blocks import InlineBlocks
from passes.insert_all_to_all import InsertAllToAll
from passes.insert_conversions import InsertConversions
from passes.locate_attention import LocateAttention
from passes.lower_attention import LowerAttention
from passes.propagate_placements import PropagatePlacements
from passes.relax_views import RelaxViews
from passes.remove_no_ops import RemoveNoOps
from passes.scale_output_gradients import ScaleOutputGradients
from passes.seed_random_operations import SeedRandomOperations
from passes.simplify_masks import SimplifyMasks
from passes.specialize_length import SpecializeLength
from surgery.pipeline import Pass

SEQUENCE_PARALLEL: tuple[Pass, ...] = (
    InlineBlocks(),
    ExtractAssumptions(),
    RelaxViews(),
    RemoveNoOps(),
    CanonicalizeSizes(),
    LocateAttention(),
    SimplifyMasks(),
    PropagatePlacements(),
    InsertConversions(),
    InsertAllToAll(),
    LowerAttention(),
    CallOpaqueModules(),
    SeedRandomOperations(),
    SpecializeLength(),
    ScaleOutputGradients(),
)
