"""Golden printouts: text files under `tests/golden/` that a person has looked at.

SURGERY_UPDATE_GOLDEN=1 pytest tests/test_printing.py     writes them anew; look at the diff before committing it
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch
import transformers

FOLDER = Path(__file__).parent / "golden"
MADE_WITH = {torch: "2.13.", transformers: "5.23."}
"""Other versions give other graphs of the same model."""


def check_golden(name: str, text: str) -> None:
    """Compare `text` with the file `name`, apart from line numbers in other people's sources."""
    for package, version in MADE_WITH.items():
        if not package.__version__.startswith(version):
            pytest.skip(f"{name} was printed with {package.__name__} {version}, and this is {package.__version__}")
    found = re.sub(r"\.py:\d+", ".py:#", text) + "\n"
    path = FOLDER / name
    if os.environ.get("SURGERY_UPDATE_GOLDEN"):
        path.write_text(found, encoding="utf-8")
    assert path.read_text(encoding="utf-8") == found, f"{path.name} differs: see tests/golden.py for how to renew it"
