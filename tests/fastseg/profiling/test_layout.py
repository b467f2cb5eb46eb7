"""Changes of memory layout, counted where they happen."""

import torch
import torch.nn.functional as F
from torch import nn

from fastseg.model import SegNet
from fastseg.profiling.layout import LayoutAudit, layout_of
from fastseg.ranges import annotate


def test_the_layout_of_a_tensor():
    maps = torch.zeros(2, 3, 4, 5)
    assert layout_of(maps) == "NCHW"
    assert layout_of(maps.to(memory_format=torch.channels_last)) == "NHWC"
    assert layout_of(torch.zeros(2, 1, 4, 5)) is None  # both
    assert layout_of(torch.zeros(2, 3, 1, 1)) is None
    assert layout_of(maps[:, :, ::2]) is None  # neither
    assert layout_of(torch.zeros(2, 3)) is None


class Turning(nn.Module):
    """A convolution of its own layout, and what turns its input to it."""

    def __init__(self) -> None:
        super().__init__()
        self.turn, self.conv = nn.Identity(), nn.Conv2d(3, 4, 3, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(self.turn(x))


def test_conversions_are_counted_by_layer_part_and_operator():
    model = Turning().to(memory_format=torch.channels_last)
    model.turn.forward = lambda x: x.contiguous(memory_format=torch.channels_last)
    images = torch.zeros(2, 3, 8, 8)
    with LayoutAudit() as audit:
        with annotate("forward"):
            out = model(images)
        with annotate("loss"):
            out.contiguous().sum()
        images.permute(0, 2, 3, 1)  # a view: nothing moves
        torch.empty_like(out).copy_(images[:, :1, :6, :6].expand(2, 4, 6, 6).contiguous())
    assert audit.counts == {
        ("turn (forward)", "aten::clone", "NCHW -> NHWC"): 1,
        ("loss", "aten::clone", "NHWC -> NCHW"): 1,
        ("step", "aten::copy_", "NCHW -> NHWC"): 1,
    }


def step(fused: bool, *, channels_last: bool) -> LayoutAudit:
    """A training step of a small SegNet, without a loss of its own, after one that is not watched."""
    model = SegNet(11, depth=2, fused=fused)
    images = torch.randn(2, 3, 16, 24)
    if channels_last:
        model, images = model.to(memory_format=torch.channels_last), images.to(memory_format=torch.channels_last)
    upstream = torch.ones(2, 11, 16, 24).contiguous(
        memory_format=torch.channels_last if channels_last else torch.contiguous_format
    )
    model(images).backward(upstream)
    with LayoutAudit() as audit:
        model(images).backward(upstream)
    return audit


def test_segnet_stays_in_channels_last_with_either_operators():
    assert not step(False, channels_last=True).counts
    assert not step(True, channels_last=True).counts


def test_pytorchs_own_loss_turns_the_scores_around():
    scores = torch.randn(2, 11, 4, 5).to(memory_format=torch.channels_last)
    with LayoutAudit() as audit:
        F.cross_entropy(scores, torch.zeros(2, 4, 5, dtype=torch.int64))
    assert set(audit.counts) == {("step", "aten::_log_softmax", "NHWC -> NCHW")}
