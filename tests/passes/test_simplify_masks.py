"""Masks that say nothing but "causal" disappear; those that say more stay."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from passes.simplify_masks import SimplifyMasks, find_plain_masks, find_single_documents
from surgery.metadata import Mask
from tests.golden import check_golden
from tests.passes.attending import KEYS, LOCATED, attend, describe
from tests.tracing import operate, trace


def documents_of(positions: Tensor) -> Tensor:
    """As transformers finds packed documents: a new one begins wherever positions do not go up by one."""
    return (positions.diff(prepend=positions[:, :1] - 1, dim=-1) != 1).cumsum(-1)


def counted(query: Tensor, key: Tensor) -> Tensor:
    positions = torch.arange(query.shape[2])[None] + 0
    return attend(query, key, describe(query, documents=documents_of(positions)))


def test_golden() -> None:
    done = operate(SimplifyMasks(), trace(counted, KEYS, KEYS), prepared_by=LOCATED)
    check_golden("simplify_masks.txt", str(done))
    assert done.result.changed == 2
    assert done.context.sites[0].mask == Mask(is_causal=True)


@pytest.mark.parametrize(
    "mask",
    [
        lambda q, p: describe(q, window=4),
        lambda q, p: describe(q, padding=p > 0),
        lambda q, p: describe(q, documents=documents_of(p)),
        lambda q, p: describe(q, documents=documents_of(torch.arange(0, 2 * p.shape[1], 2)[None])),
        lambda q, p: describe(q, documents=documents_of(torch.arange(p.shape[1])[None] * p)),
    ],
    ids=["window", "padding", "documents", "every_other", "computed"],
)
def test_leaves_alone_masks_that_say_more(mask: object) -> None:
    module = trace(
        lambda q, k, p: attend(q, k, mask(q, p)),  # type: ignore[operator]
        KEYS,
        KEYS,
        "b s",
        dtypes=(torch.float64, torch.float64, torch.int64),
    )
    done = operate(SimplifyMasks(), module, prepared_by=LOCATED)
    assert done.result.changed == 0
    assert not find_plain_masks(done.graph, done.context) and not find_single_documents(done.graph)
