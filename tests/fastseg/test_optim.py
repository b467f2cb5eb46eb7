"""The optimiser: schedules against torch's schedulers, which SGD is chosen and why, averages worked by hand."""

import math
import subprocess
import sys
from fractions import Fraction

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import lr_scheduler

from fastseg.config import Train
from fastseg.errors import UsageError
from fastseg.model import SegNet
from fastseg.training import optim
from fastseg.training.optim import Average, make_optimizer, parameter_groups, schedule

CPU, CUDA = torch.device("cpu"), torch.device("cuda")  # of the second only the name is needed


def rates_of_torch(make, lr: float, steps: int) -> list[float]:
    """The learning rate that a torch scheduler gives each step."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = make(optimizer)
    found = [optimizer.param_groups[0]["lr"]]
    for _ in range(steps - 1):
        optimizer.step()
        scheduler.step()
        found.append(optimizer.param_groups[0]["lr"])
    return found


def rates(steps: int, batch: int = 4, **options) -> list[float]:
    rate = schedule(Train(**options), steps, batch)
    return [rate(step) for step in range(steps)]


@given(steps=st.integers(2, 60), warmup=st.floats(0, 0.99), lr=st.sampled_from([1e-3, 0.05, 1.0]))
@settings(max_examples=25, deadline=None)
def test_one_cycle_is_torchs(steps, warmup, lr):
    assume(abs(warmup * steps - 1) > 1e-6)  # where torch divides by zero
    options = {"total_steps": steps, "pct_start": warmup, "cycle_momentum": False}
    wanted = rates_of_torch(lambda o: lr_scheduler.OneCycleLR(o, lr, **options), lr, steps)
    assert rates(steps, schedule="one-cycle", lr=lr, warmup=warmup) == pytest.approx(wanted, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize(("scaling", "factor"), [("none", 1.0), ("linear", 8.0), ("sqrt", 8.0**0.5)])
def test_a_rate_scaled_for_a_batch_of_32_grows_over_five_epochs(scaling, factor):
    # Goyal et al. 2017: from lr to lr x 32 / 4, in equal steps over the first 5 of 10 epochs of 4 steps.
    found = rates(40, 32, lr=0.1, epochs=10, lr_batch=4, lr_scaling=scaling)
    assert found[0] == pytest.approx(0.1)
    assert found[10] == pytest.approx(0.1 * (1 + factor) / 2)
    assert found[20:] == pytest.approx([0.1 * factor] * 20)


def test_a_scaled_cycle_needs_no_other_warm_up():
    options = {"schedule": "one-cycle", "lr": 0.1, "epochs": 10, "lr_scaling": "linear"}
    assert rates(40, 16, **options) == pytest.approx([4 * rate for rate in rates(40, 4, **options)])


def test_a_scaled_rate_drops_with_its_schedule():
    found = rates(8, 8, schedule="step", lr=1.0, epochs=8, step_epochs=4, lr_scaling="linear", lr_warmup_epochs=0)
    assert found == pytest.approx([2.0] * 4 + [0.2] * 4)


def test_one_cycle_starts_peaks_and_ends_as_published():
    # 0.3 * 100 - 1 = 29 is the peak; Smith and Topin's cycle as torch has it: peak / 25, peak, peak / 25 / 10^4.
    found = rates(100, schedule="one-cycle", lr=0.5, warmup=0.3)
    assert [found[0], found[29], found[99]] == pytest.approx([0.02, 0.5, 2e-6])
    assert max(range(100), key=found.__getitem__) == 29


@pytest.mark.parametrize("warmup", [0.0, 0.3, 0.5])
@pytest.mark.parametrize("steps", [1, 2])
def test_a_cycle_of_a_step_or_two_has_finite_rates(steps, warmup):
    found = rates(steps, schedule="one-cycle", lr=0.5, warmup=warmup)
    assert all(0 < rate <= 0.5 for rate in found)


@given(st.integers(1, 9), st.integers(1, 12), st.integers(1, 5), st.sampled_from([0.1, 0.5, 1.0]))
@settings(max_examples=25, deadline=None)
def test_step_is_torchs_over_whole_epochs(per_epoch, epochs, step_epochs, factor):
    total = per_epoch * epochs
    wanted = rates_of_torch(lambda o: lr_scheduler.StepLR(o, step_epochs * per_epoch, factor), 0.1, total)
    found = rates(total, schedule="step", lr=0.1, epochs=epochs, step_epochs=step_epochs, step_factor=factor)
    assert found == pytest.approx(wanted, rel=1e-9)


@given(total=st.integers(1, 400), epochs=st.integers(1, 40), step_epochs=st.integers(1, 5))
@example(total=42, epochs=36, step_epochs=10)  # 7 images in batches of 6: step 35 begins epoch 30, the third drop
@settings(max_examples=100, deadline=None)
def test_step_drops_at_the_first_step_of_an_epoch_where_epochs_are_no_whole_steps(total, epochs, step_epochs):
    found = rates(total, schedule="step", lr=1.0, epochs=epochs, step_epochs=step_epochs, step_factor=0.5)
    drops = [math.floor(Fraction(step * epochs, total * step_epochs)) for step in range(total)]
    assert found == [0.5**drop for drop in drops]


@given(total=st.integers(1, 60), power=st.sampled_from([0.5, 0.9, 1.0, 2.0]))
@settings(max_examples=20, deadline=None)
def test_poly_is_torchs(total, power):
    wanted = rates_of_torch(lambda o: lr_scheduler.PolynomialLR(o, total, power), 0.1, total)
    assert rates(total, schedule="poly", lr=0.1, power=power) == pytest.approx(wanted, rel=1e-6)


def test_constant_stays():
    assert rates(5, schedule="constant", lr=0.01) == [0.01] * 5


def test_all_parameters_decay_in_one_group_or_norms_and_biases_not_at_all():
    model = SegNet(11, depth=1)  # 2 convolutions down, 2 up; 3 batch norms; the last convolution's bias
    (group,) = parameter_groups(model, Train(weight_decay=0.01, decay_norms=True))
    assert {id(p) for p in group["params"]} == {id(p) for p in model.parameters()}
    assert group["weight_decay"] == 0.01
    decayed, free = parameter_groups(model, Train(weight_decay=0.01, decay_norms=False))
    assert {id(p) for p in decayed["params"]} == {id(m.weight) for m in model.modules() if isinstance(m, nn.Conv2d)}
    assert len(decayed["params"]) == 4
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    wanted = {id(p) for m in norms for p in (m.weight, m.bias)} | {id(model.decoder[-1][-1].bias)}
    assert {id(p) for p in free["params"]} == wanted
    assert (len(free["params"]), decayed["weight_decay"], free["weight_decay"]) == (7, 0.01, 0.0)


# What stands in for NVIDIA's apex.
APPLIER = """
class multi_tensor_applier:
    available = {}
"""
SGD = """
import torch
class FusedSGD(torch.optim.SGD):
    pass
"""


@pytest.fixture
def apex(tmp_path, monkeypatch):
    """apex(kind) puts a package of that name on the path; None leaves the machine without one."""

    def forget():
        for name in [name for name in sys.modules if name.partition(".")[0] == "apex"]:
            del sys.modules[name]

    def install(kind: str | None) -> None:
        if kind is None:
            return
        package = tmp_path / "apex"
        package.mkdir()
        (package / "__init__.py").write_text("version = '0.9.10.dev0'\n")
        if kind != "unrelated":
            (package / "multi_tensor_apply.py").write_text(APPLIER.format(kind == "with CUDA"))
            (package / "optimizers.py").write_text(SGD)

    forget()
    monkeypatch.syspath_prepend(tmp_path)
    yield install
    forget()


REASONS = {
    None: "no apex",
    "unrelated": "no apex",
    "without CUDA": "apex was built without its CUDA part",
    "with CUDA": "apex's kernels need fp32 parameters on a GPU",
}


@pytest.mark.parametrize("kind", REASONS)
def test_on_a_cpu_torchs_fused_sgd_runs_and_says_why_not_apex(apex, kind):
    apex(kind)
    model = SegNet(3, depth=1)
    optimizer, name, why = make_optimizer(model, Train(lr=0.3, momentum=0.8), CPU)
    assert (type(optimizer), name) == (optim.SGD, "torch fused SGD")
    assert REASONS[kind] in why
    assert [optimizer.defaults[key] for key in ("fused", "lr", "momentum")] == [True, 0.3, 0.8]


@pytest.mark.parametrize("kind", REASONS)
def test_apex_that_was_asked_for_and_cannot_be_had_is_refused_with_the_reason(apex, kind):
    apex(kind)
    with pytest.raises(UsageError, match=r"^train\.optimizer = apex: .*" + REASONS[kind]) as error:
        make_optimizer(SegNet(3, depth=1), Train(optimizer="apex"), CPU)
    assert "\n" not in str(error.value)


def test_apex_with_its_cuda_part_runs_on_a_gpu_unless_torch_was_asked_for(apex):
    apex("with CUDA")
    model = SegNet(3, depth=1)
    optimizer, name, _ = make_optimizer(model, Train(lr=0.3, momentum=0.8, nesterov=True), CUDA)
    assert (type(optimizer).__module__, name) == ("apex.optimizers", "apex FusedSGD")
    assert [optimizer.defaults[key] for key in ("lr", "momentum", "nesterov")] == [0.3, 0.8, True]
    assert make_optimizer(model, Train(optimizer="apex"), CUDA)[1] == "apex FusedSGD"
    assert make_optimizer(model, Train(optimizer="torch"), CUDA)[1:] == ("torch fused SGD", "as asked")
    # Its kernel skips bf16 parameters without a word.
    assert make_optimizer(model.bfloat16(), Train(), CUDA)[1] == "torch fused SGD"


# Gradient 1 + 0.25 * 2 = 1.5, weight 1.85; then 0.5 * 1.5 + 1 + 0.25 * 1.85 = 2.2125. With Nesterov's momentum the step
# is gradient + 0.5 * momentum: 1.5 + 0.75, weight 1.775; then 1.44375 + 0.5 * (0.75 + 1.44375) = 2.540625.
@pytest.mark.parametrize(("nesterov", "weight"), [(False, 1.85 - 0.22125), (True, 1.775 - 0.2540625)])
def test_two_steps_of_sgd_worked_by_hand(nesterov, weight):
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 2.0)
    train = Train(lr=0.1, momentum=0.5, nesterov=nesterov, weight_decay=0.25, optimizer="torch")
    optimizer, _, _ = make_optimizer(model, train, CPU)
    for _ in range(2):
        model.weight.grad = torch.ones(1, 1)
        optimizer.step()
    assert model.weight.item() == pytest.approx(weight, rel=1e-6)


def test_an_average_of_three_updates_worked_by_hand():
    model = nn.BatchNorm1d(1)  # weight 1, bias 0, and buffers
    average = Average(model, 0.75)
    for step, weight in enumerate((5.0, 9.0, 1.0), 1):
        with torch.no_grad():
            model.weight.fill_(weight)
            model.running_mean.fill_(10.0 * step)
            model.num_batches_tracked.fill_(step)
        average.update(model)
    # 1 -> 1 + (5 - 1) / 4 = 2 -> 2 + (9 - 2) / 4 = 3.75 -> 3.75 + (1 - 3.75) / 4 = 3.0625
    assert average.model.weight.item() == 3.0625
    assert (average.model.bias.item(), model.weight.item()) == (0, 1)
    assert (average.model.running_mean.item(), average.model.num_batches_tracked.item()) == (30, 3)
    assert not any(p.requires_grad for p in average.model.parameters())
    assert all(p.requires_grad for p in model.parameters())


def test_a_first_step_that_the_scaler_skips_leaves_no_trace():
    """torch's own fused SGD makes its momentum in that step without setting it, and goes on with what was in memory."""
    start = torch.arange(6.0)
    found = []
    for fused in (True, False):
        layer = nn.Linear(6, 1, bias=False)
        layer.weight.data.copy_(start)
        if fused:
            optimizer, name, _ = make_optimizer(layer, Train(lr=0.5, weight_decay=0, optimizer="torch"), CPU)
            assert name == "torch fused SGD"
        else:
            optimizer = torch.optim.SGD(layer.parameters(), lr=0.5, momentum=0.9)
        scaler = torch.amp.GradScaler("cpu")
        for factor in (math.inf, 1.0, 2.0):
            rubbish = [torch.full((1, 6), math.nan) for _ in range(100)]
            del rubbish
            scaler.scale((layer.weight * factor).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        found.append(layer.weight.detach().clone())
    assert torch.equal(*found)
    # By hand: gradients 1 and 2, momentum 0.9: 0.5 * 1, then 0.5 * (0.9 * 1 + 2).
    assert torch.allclose(found[0], (start - 0.5 - 1.45)[None])


@pytest.mark.parametrize("fused", [True, False])
def test_our_sgd_is_torchs(fused):
    found = []
    for make in (optim.SGD, torch.optim.SGD):
        parameters = [nn.Parameter(torch.linspace(-1, 1, 6)), nn.Parameter(torch.ones(2, 3))]
        optimizer = make(parameters[:1], lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True, fused=fused)
        optimizer.add_param_group({"params": parameters[1:], "weight_decay": 0.0})
        for step in range(4):
            if step == 2:
                optimizer.load_state_dict(optimizer.state_dict())
            sum((p * p * (step + 1)).sum() for p in parameters).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert [p.grad for p in parameters] == [None, None]
        found.append([*parameters, *(optimizer.state[p]["momentum_buffer"] for p in parameters)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_our_sgd_imports_no_compiler():
    code = (
        "import sys, torch; from fastseg.config import Train; from fastseg.training.optim import make_optimizer;"
        "m = torch.nn.Linear(1, 1); o, name, _ = make_optimizer(m, Train(), torch.device('cpu'));"
        "m(torch.ones(1, 1)).sum().backward(); o.step(); o.zero_grad(); o.load_state_dict(o.state_dict());"
        "print(name, 'torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split("\n")[0] == "torch fused SGD False", done.stderr
