"""Inference mode where this torch has derivatives inside it."""

import pytest
import torch

from difflayers.linalg._autodiff import _derives_in_inference_mode

# torch 2.6 takes derivatives to be zero inside inference mode: layers that need some refuse it there
needs_inference = pytest.mark.skipif(not _derives_in_inference_mode(), reason="this torch has no derivatives in it")


def inference() -> torch.inference_mode | torch.no_grad:
    """Inference mode, or no_grad where there are no derivatives in it."""
    return torch.inference_mode() if _derives_in_inference_mode() else torch.no_grad()
