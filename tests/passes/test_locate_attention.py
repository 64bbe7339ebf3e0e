"""Attention calls are found, whoever makes them."""

from __future__ import annotations

import pytest
import torch.nn.functional as F

from passes.locate_attention import LocateAttention, find_sites
from surgery.errors import UnsupportedOperationError
from surgery.metadata import Mask
from tests.golden import check_golden
from tests.passes.attending import KEYS, attend, causal, describe
from tests.tracing import copy_graph, make_context, operate, trace


def test_golden() -> None:
    module = trace(lambda q, k: F.scaled_dot_product_attention(q, k, k, is_causal=True), KEYS, KEYS)
    done = operate(LocateAttention(), module)
    check_golden("locate_attention.txt", str(done))
    assert done.result.changed == 1


def test_finds_sites() -> None:
    graph = copy_graph(causal())
    (site,) = find_sites(graph, make_context(graph, 4))
    assert (site.num_heads, site.num_kv_heads, site.head_size, site.element_size_bytes) == (8, 4, 4, 8)
    assert site.mask == Mask(is_causal=True)


def test_reads_masks() -> None:
    module = trace(lambda q, k: attend(q, k, describe(q, documents=k[:, 0, :, 0], window=3)), "b 8 s 4", KEYS)
    graph = copy_graph(module)
    (site,) = find_sites(graph, make_context(graph, 4))
    assert site.mask is not None
    assert str(site.mask) == "causal, window 3, documents"


def test_leaves_recorded_calls_alone() -> None:
    done = operate(LocateAttention(), causal())
    assert done.result.changed == 0
    assert done.before == done.after
    assert len(done.context.sites) == 1


def test_a_mask_of_the_models_own_has_no_description() -> None:
    module = trace(lambda q, k: attend(q, k, (q @ k.transpose(2, 3)) > 0), "b 4 s 4", KEYS)
    graph = copy_graph(module)
    (site,) = find_sites(graph, make_context(graph, 4))
    assert site.mask is None


@pytest.mark.parametrize(
    ("query", "keys"),
    [
        ("b s 4", "b s 4"),
        ("4 b s 4", "4 b s 4"),
        ("b 1 s 4", "b 4 s 4"),
        ("b 4 s 4", "1 4 s 4"),
    ],
)
def test_leaves_attention_without_heads_to_the_rule_table(query: str, keys: str) -> None:
    done = operate(LocateAttention(), trace(lambda q, k: F.scaled_dot_product_attention(q, k, k), query, keys))
    assert not done.context.sites
    assert done.before == done.after
    assert "[B, N, S, H]" in done.result.skips[0].reason


def test_finds_a_key_head_that_is_broadcast() -> None:
    module = trace(lambda q, k: F.scaled_dot_product_attention(q, k, k), "b 4 s 4", "b 1 s 4")
    (site,) = operate(LocateAttention(), module).context.sites
    assert (site.num_heads, site.num_kv_heads) == (4, 1)


def test_refuses_attention_functions_without_heads() -> None:
    module = trace(lambda q: attend(q, q, None), "4 b s 4")
    with pytest.raises(UnsupportedOperationError, match=r"surgery.attention.*expected.*\[B, N, S, H\].*Transpose"):
        operate(LocateAttention(), module)
