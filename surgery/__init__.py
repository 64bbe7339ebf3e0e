"""Model surgery on torch.fx graphs: make a Hugging Face model sequence-parallel, exactly, and see what was done."""

from surgery.api import restore, transform
from surgery.errors import (
    CaptureError,
    ConfigurationError,
    InputError,
    LaunchError,
    SurgeryError,
    UnsupportedOperationError,
)

__all__ = [
    "CaptureError",
    "ConfigurationError",
    "InputError",
    "LaunchError",
    "SurgeryError",
    "UnsupportedOperationError",
    "restore",
    "transform",
]
