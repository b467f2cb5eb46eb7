"""`fastseg bench model`: the network's size and work, and images per second of a training step without a data path."""

import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from fastseg.bench.harness import Found, exact, ratio, result, take_turns
from fastseg.config import Runtime, Train
from fastseg.distributed import choose_dtype, join
from fastseg.kernels import launch
from fastseg.kernels.cross_entropy import cross_entropy_sum, torch_cross_entropy_sum
from fastseg.model import SegNet
from fastseg.optim import make_optimizer

CLASSES = 11


def count_flops(size: tuple[int, int]) -> int:
    """Floating-point operations of forward and backward for one image, a multiply-add as two; nothing is computed."""
    with torch.device("meta"):
        model = SegNet(CLASSES)
        images = torch.empty(1, 3, *size)
    with FlopCounterMode(display=False) as counter:
        model(images).sum().backward()
    return counter.get_total_flops()


class _Step:
    """A training step on one random batch, in one precision, with the operators that `auto` chooses."""

    def __init__(self, device: torch.device, dtype: torch.dtype, size: tuple[int, int], batch: int) -> None:
        torch.manual_seed(0)
        fused = launch.choose("auto", device)[0] == "fused"
        self.model = SegNet(CLASSES, fused=fused).to(device).to(memory_format=torch.channels_last)
        self.optimizer, _, _ = make_optimizer(self.model, Train(), device)
        self.device, self.dtype = device, dtype
        self.images = torch.randn(batch, 3, *size, device=device, dtype=dtype).contiguous(
            memory_format=torch.channels_last
        )
        self.labels = torch.randint(0, CLASSES, (batch, *size), device=device, dtype=torch.uint8)
        self.weights = torch.ones(CLASSES, device=device)

    def __call__(self) -> None:
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            logits = self.model(self.images)
        entropy = cross_entropy_sum if self.model.fused else torch_cross_entropy_sum
        (entropy(logits, self.labels, self.weights) / self.labels.numel()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def images_per_second(self) -> float:
        """Over one step on a CPU, over 20 on a GPU, where one is too short to time."""
        steps = 20 if self.device.type == "cuda" else 1
        self._wait()
        start = time.perf_counter()
        for _ in range(steps):
            self()
        self._wait()
        return steps * len(self.images) / (time.perf_counter() - start)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def measure(*, data: str, size: tuple[int, int], batch: int, rounds: int, device: str) -> Found:
    """Parameters, FLOPs and the step's throughput in fp32 and in the device's mixed precision."""
    world, _ = join(Runtime(device=device))
    best, _ = choose_dtype("auto", world.device.type)
    steps = {str(t).removeprefix("torch."): _Step(world.device, t, size, batch) for t in {torch.float32, best}}
    samples = take_turns({name: step.images_per_second for name, step in steps.items()}, rounds)
    name, flops = f"{size[0]}x{size[1]}", count_flops(size)
    results = [
        exact("model parameters", "", sum(p.numel() for p in SegNet(CLASSES).parameters())),
        exact(f"model work {name}, forward+backward", "GFLOP/img", flops / 1e9),
    ]
    for kind, figures in samples.items():
        results.append(result(f"train step {kind} {name} batch {batch}", "img/s", figures))
        results.append(result(f"train step {kind} {name} batch {batch}", "GFLOP/s", [f * flops / 1e9 for f in figures]))
    mixed = str(best).removeprefix("torch.")
    ratios = (
        [ratio(f"train step {mixed} / float32", samples[mixed], samples["float32"])]
        if mixed in samples and mixed != "float32"
        else []
    )
    return Found(results, ratios)
