"""The global state of torch that training needs, whatever the caller's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def as_by_default(device: torch.device | str) -> Iterator[None]:
    """Gradients on, no inference mode, no autocast on `device`, float32 as the default type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(torch.device(device).type, enabled=False),
        ):
            yield
    finally:
        torch.set_default_dtype(before)
