"""Whether a backward is linear in its cotangents: each rank runs it on an addend, and the gradients are to add up.

backward(u) + backward(v) == backward(u + v)        tried with random u and v, at a small and a large scale
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SCALES = (2.0**-13, 2.0**13)


def is_backward_linear(outputs: Sequence[Tensor], sources: Sequence[Tensor]) -> bool:
    """Whether the gradients of `outputs` with respect to `sources` add up over cotangents, drawn at random."""
    if not outputs:
        return True
    first, second = ([torch.randn_like(x) for x in outputs] for _ in range(2))

    def pull(*scales: float) -> list[Tensor]:
        cotangents = [scales[0] * u + scales[1] * v for u, v in zip(first, second, strict=True)]
        found = torch.autograd.grad(outputs, sources, cotangents, retain_graph=True, allow_unused=True)
        return [
            torch.zeros_like(x) if gradient is None else gradient for x, gradient in zip(sources, found, strict=True)
        ]

    one, other = pull(1.0, 0.0), pull(0.0, 1.0)
    expected = [u + v for u, v in zip(one, other, strict=True)]
    return all(_are_same([scale * x for x in expected], pull(scale, scale)) for scale in SCALES)


def _are_same(first: list[Tensor], second: list[Tensor]) -> bool:
    """Whether two lists of gradients agree, whose sums were taken at other scales.

    One that is zero but for rounding, as a key bias's under softmax is, is judged by the largest of the list.
    """
    noise = max(_largest(x) * torch.finfo(x.dtype).eps for x in first) * 8
    return all(
        is_within(x, y, max(0.01, 8 * torch.finfo(x.dtype).eps ** 0.75), noise)
        for x, y in zip(first, second, strict=True)
    )


def is_within(first: Tensor, second: Tensor, tolerance: float, noise: float = 0.0) -> bool:
    """Whether two tensors differ by at most `noise`, or `tolerance` times the largest entry."""
    atol = max(tolerance * _largest(first), noise)
    return torch.allclose(first, second, rtol=0.0, atol=atol, equal_nan=True)


def _largest(x: Tensor) -> float:
    return float(x.detach().abs().nan_to_num().max()) if x.numel() else 0.0
