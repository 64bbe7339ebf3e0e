"""The names that DeepSpeed's `deepspeed.runtime.sequence_parallel.ulysses_sp` has, made of this package's parts.

    from surgery.ulysses import UlyssesSPAttentionHF, UlyssesSPDataLoaderAdapter

A script that trains with DeepSpeed's classes changes this import, and nothing else: `docs/migration.md`.
"""

from surgery.ulysses.attention import UlyssesSPAttentionHF
from surgery.ulysses.dataloader import UlyssesSPDataLoaderAdapter
from surgery.ulysses.registration import forget

__all__ = ["UlyssesSPAttentionHF", "UlyssesSPDataLoaderAdapter", "forget"]
