"""Where rules are registered and found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from surgery.rules.call import Rule


@dataclass(frozen=True)
class Row:
    """One line of the table: a rule, the family it belongs to, and whether it also serves without sharded operands."""

    family: str
    rule: Rule
    creates: bool = False


RULES: dict[str, Row] = {}


def rule(*operations: str, family: str, creates: bool = False) -> Callable[[Rule], Rule]:
    """Register a rule for `operations`, named as in ATen's schemas (`"aten::view"`: all its overloads).

    `creates` marks rules that can give a sharded result although no operand is sharded (`zeros`, `expand`).
    """

    def register(function: Rule) -> Rule:
        for operation in operations:
            assert operation not in RULES, f"two rules for {operation}"
            RULES[operation] = Row(family, function, creates)
        return function

    return register


def operation_name(target: Any) -> str:
    """`"aten::view"` for `torch.ops.aten.view.default`."""
    return str(target._schema.name)


def is_call(node: Any, operation: str) -> bool:
    """Whether `node` calls an overload of `operation`, such as `"aten::view"`."""
    is_operator = isinstance(node, fx.Node) and isinstance(node.target, torch._ops.OpOverload)
    return is_operator and operation_name(node.target) == operation


def find_rule(target: Any) -> Row | None:
    """The row for an operator, or the pointwise row if torch tags it as pointwise, or None."""
    row = RULES.get(operation_name(target))
    if row is None and torch.Tag.pointwise in target.tags:
        return RULES["pointwise"]
    return row


def family_of(target: Any) -> str | None:
    row = find_rule(target)
    return row.family if row is not None else None
