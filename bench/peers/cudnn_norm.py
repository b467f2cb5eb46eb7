"""cuDNN's own batch norm + ReLU on 16-bit NHWC maps, forward and backward, by NVIDIA's graph API.

Its patterns NormAddRelu and DReluForkDNorm (https://docs.nvidia.com/deeplearning/cudnn/frontend/latest/), without the
addition; ReLU's mask is a bit for each value. Of the package its graphs alone are used, which need none of the others
that it asks for.
"""

from collections.abc import Callable
from typing import Any

import cudnn
import torch
from torch import nn

TYPES = {torch.bfloat16: cudnn.data_type.BFLOAT16, torch.float16: cudnn.data_type.HALF}


def _graph(dtype: torch.dtype, handle: Any) -> Any:
    fp32 = cudnn.data_type.FLOAT
    return cudnn.pygraph(io_data_type=TYPES[dtype], intermediate_data_type=fp32, compute_data_type=fp32, handle=handle)


def _vector(values: torch.Tensor | None) -> torch.Tensor:
    """[C] as cuDNN wants it: [1, C, 1, 1], a view."""
    assert values is not None
    return values.detach()[None, :, None, None]


def forward_graph(x: torch.Tensor, norm: nn.BatchNorm2d, handle: Any) -> tuple[Any, dict[Any, torch.Tensor]]:
    """The graph, and its tensors: the last six are y, mask, mean, inverse deviation and the two running statistics."""
    graph = _graph(x.dtype, handle)
    scalars = [torch.full((1, 1, 1, 1), value, dtype=torch.float32) for value in (norm.eps, norm.momentum or 0.0)]
    zero = torch.zeros((1, 1, 1, 1), dtype=x.dtype)
    given = [x, *map(_vector, (norm.weight, norm.bias, norm.running_mean, norm.running_var)), *scalars, zero]
    x_, scale, bias, mean, var, eps, momentum, zero_ = (graph.tensor_like(tensor) for tensor in given)
    y, *statistics = graph.batchnorm(
        name="norm",
        input=x_,
        scale=scale,
        bias=bias,
        in_running_mean=mean,
        in_running_var=var,
        epsilon=eps,
        momentum=momentum,
    )
    y.set_data_type(TYPES[x.dtype])
    y = graph.relu(name="relu", input=y)
    y.set_data_type(TYPES[x.dtype]).set_output(True)
    mask = graph.cmp_gt(name="positive", input=y, comparison=zero_)
    mask.set_output(True).set_data_type(cudnn.data_type.BOOLEAN)
    for vector in statistics:
        vector.set_output(True).set_data_type(cudnn.data_type.FLOAT)
    made = [torch.empty_like(given[1]) for _ in range(2)]
    bits = torch.empty(x.numel() // 8, dtype=torch.uint8, device=x.device)
    found = dict(zip((x_, scale, bias, mean, var, eps, momentum, zero_), given, strict=True))
    # The running statistics move where they are.
    found |= dict(zip((y, mask, *statistics), (torch.empty_like(x), bits, *made, given[3], given[4]), strict=True))
    return graph, found


def backward_graph(
    x: torch.Tensor, gradient: torch.Tensor, norm: nn.BatchNorm2d, saved: list[torch.Tensor], handle: Any
) -> tuple[Any, dict[Any, torch.Tensor]]:
    """The graph, and its tensors: the last three are the gradients of x, weight and bias.

    Args:
        saved: mask, mean and inverse deviation of the forward graph.
    """
    graph = _graph(x.dtype, handle)
    weight = _vector(norm.weight)
    given = [x, gradient, weight, *saved[1:]]
    x_, gradient_, scale, mean, inverse = (graph.tensor_like(tensor) for tensor in given)
    mask = graph.tensor(name="mask", dim=x.shape, stride=x.stride(), data_type=cudnn.data_type.BOOLEAN)
    passed = graph.mul(name="through relu", a=gradient_, b=mask)
    passed.set_data_type(TYPES[x.dtype])
    gradients = graph.batchnorm_backward(
        name="norm backward", grad=passed, input=x_, scale=scale, mean=mean, inv_variance=inverse
    )
    for tensor, kind in zip(gradients, (TYPES[x.dtype], *[cudnn.data_type.FLOAT] * 2), strict=True):
        tensor.set_output(True).set_data_type(kind)
    found = dict(zip((x_, gradient_, scale, mean, inverse, mask), (*given, saved[0]), strict=True))
    found |= dict(
        zip(gradients, (torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)), strict=True)
    )
    return graph, found


def norm_relu(
    x: torch.Tensor, gradient: torch.Tensor, norm: nn.BatchNorm2d
) -> Callable[[], tuple[torch.Tensor, list[torch.Tensor]]]:
    """A call computes relu(norm(x)), moves `norm`'s running statistics, and gives y and the gradients of x, weight and
    bias. Maps are channels-last on a GPU, in 16 bits; channels a multiple of 8.

    Raises:
        RuntimeError: cuDNN has no engine for it here; its message says why.
    """
    handle = cudnn.create_handle()
    graph, tensors = forward_graph(x, norm, handle)
    y, *saved = list(tensors.values())[-6:-2]
    back, more = backward_graph(x, gradient, norm, saved, handle)
    runs = []
    for each, its in ((graph, tensors), (back, more)):
        each.validate()
        each.build_operation_graph()
        each.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        each.check_support()
        each.build_plans()
        workspace = torch.empty(max(1, each.get_workspace_size()), dtype=torch.uint8, device=x.device)
        runs.append((each, its, workspace))

    def call() -> tuple[torch.Tensor, list[torch.Tensor]]:
        cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
        for each, its, workspace in runs:
            each.execute(its, workspace, handle=handle)
        return y, list(more.values())[-3:]

    return call
