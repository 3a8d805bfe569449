import pytest
import torch


@pytest.fixture(autouse=True)
def exact():
    """float32 without TF32, which torch's convolutions use by default: it alone moves these models' logits by 1e-3."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before
