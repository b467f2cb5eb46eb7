"""The same tests for each way a fused operator can run: its reference on a CPU, its Triton kernel in the interpreter
(TRITON_INTERPRET=1, which `make test` runs this folder under too), and its Triton kernel on a GPU.
"""

import pytest
import torch


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> torch.device:
    """Where the operands lie."""
    return torch.device(request.param)
