"""Which classes of modules may be called whole: a model's own, in layers or apart from them, outermost first.

model.embed_tokens      ScaledEmbedding   outermost
model.layers[0]         DecoderLayer      outermost; its parts: Attention, Experts
model.layers[0].self_attn.q_norm          a part of Attention
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn

from surgery.regions import is_region

ModuleClass = type[nn.Module]


def candidate_paths(model: nn.Module) -> Iterator[str]:
    """Modules of more than torch's own, inside layers or apart from them, and no deeper than mixtures of experts."""
    modules = dict(model.named_modules())
    stacks = [path for path, module in modules.items() if isinstance(module, nn.ModuleList)]
    regions = [path for path, module in modules.items() if is_region(type(module))]
    for path, module in modules.items():
        is_around_a_stack = any(stack.startswith(f"{path}.") and not _is_inside(stack, stacks) for stack in stacks)
        is_own = not type(module).__module__.startswith("torch.nn.")
        if path and is_own and not is_around_a_stack and not _is_inside(path, regions):
            yield path


def outermost_classes(model: nn.Module) -> list[ModuleClass]:
    """Those that are inside no other candidate; layers last."""
    modules = dict(model.named_modules())
    paths = _outermost(candidate_paths(model))
    ordered = sorted(paths, key=lambda path: isinstance(modules.get(path.rpartition(".")[0]), nn.ModuleList))
    return _classes(modules[path] for path in ordered)


def parts_of(model: nn.Module, module_class: ModuleClass) -> list[ModuleClass]:
    """The candidates directly inside modules of a class."""
    modules = dict(model.named_modules())
    around = [path for path, module in modules.items() if type(module) is module_class]
    inside = _outermost(path for path in candidate_paths(model) if _is_inside(path, around))
    return _classes(modules[path] for path in inside)


def _classes(modules: Iterable[nn.Module]) -> list[ModuleClass]:
    return list(dict.fromkeys(map(type, modules)))


def _outermost(paths: Iterable[str]) -> list[str]:
    known = list(paths)
    return [path for path in known if not _is_inside(path, known)]


def _is_inside(path: str, outer: list[str]) -> bool:
    return any(path.startswith(f"{other}.") for other in outer)
