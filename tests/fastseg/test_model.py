"""The network: its published size and work, any input size, and an encoder that is torchvision's VGG."""

import functools
import hashlib
import os
import urllib.error

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fastseg.errors import FastsegError, UsageError
from fastseg.kernels.pool import torch_pool
from fastseg.model import SegNet, initialise, load_vgg

# VGG-16 as published (configuration D): input and output channels of its 3x3 convolutions, stage by stage.
VGG16 = [
    [(3, 64), (64, 64)],
    [(64, 128), (128, 128)],
    [(128, 256), (256, 256), (256, 256)],
    [(256, 512), (512, 512), (512, 512)],
    [(512, 512), (512, 512), (512, 512)],
]
# SegNet's decoder turns each stage round; its last convolution gives the 11 class scores.
DECODER = [[(b, a) for a, b in reversed(stage)] for stage in reversed(VGG16)]
DECODER[-1][-1] = (64, 11)


def convolutions(module: nn.Module) -> list[nn.Conv2d]:
    return [m for m in module.modules() if isinstance(m, nn.Conv2d)]


def meta_segnet(**options) -> SegNet:
    """The network without memory for its weights."""
    with torch.device("meta"):
        return SegNet(11, **options)


@pytest.mark.parametrize(("backbone", "count"), [("vgg16", 13), ("vgg19", 16)])
def test_the_encoder_has_vggs_convolutions(backbone, count):
    model = meta_segnet(backbone=backbone)
    assert len(convolutions(model.encoder)) == len(convolutions(model.decoder)) == count
    assert all(c.kernel_size == (3, 3) and c.padding == (1, 1) for c in convolutions(model))


def test_the_layers_are_the_published_ones():
    found = [(c.in_channels, c.out_channels) for c in convolutions(meta_segnet())]
    assert found == [pair for stage in VGG16 + DECODER for pair in stage]


def test_the_parameter_count_is_the_published_one():
    pairs = [pair for stage in VGG16 + DECODER for pair in stage]
    norms = sum(2 * b for _, b in pairs[:-1])  # scale and shift
    wanted = sum(9 * a * b for a, b in pairs) + norms + 11
    assert wanted == 29_441_419  # 29.44 M
    assert sum(p.numel() for p in meta_segnet().parameters()) == wanted


def test_forward_and_backward_take_the_published_work():
    pairs = [[*stage] for stage in VGG16 + DECODER]
    sizes = [(360, 480), (180, 240), (90, 120), (45, 60), (23, 30)]
    sizes += sizes[::-1]
    work = sum(6 * 9 * a * b * h * w for stage, (h, w) in zip(pairs, sizes, strict=True) for a, b in stage)
    wanted = work - 2 * 9 * 3 * 64 * 360 * 480  # no gradient for the images
    model = meta_segnet()
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, 360, 480, device="meta")).sum().backward()
    assert counter.get_total_flops() == wanted
    assert wanted / 1e9 == pytest.approx(639.7, rel=1e-3)


@given(size=st.tuples(st.integers(1, 70), st.integers(1, 70)), depth=st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_any_size_comes_out_as_it_went_in(size, depth):
    model = meta_segnet(depth=depth).eval()
    assert model(torch.empty(2, 3, *size, device="meta")).shape == (2, 11, *size)


@pytest.mark.parametrize(("size", "depth"), [((1, 1), 3), ((33, 47), 5), ((5, 7), 1)])
def test_odd_sizes_give_finite_scores_and_a_gradient_for_every_weight(size, depth):
    torch.manual_seed(0)
    model = SegNet(3, depth=depth)
    scores = model(torch.randn(2, 3, *size))
    assert scores.shape == (2, 3, *size)
    scores.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("options", [{"depth": 0}, {"depth": 6}, {"backbone": "vgg17"}])
def test_a_network_that_does_not_exist_is_refused(options):
    with pytest.raises(UsageError, match=f"model.{next(iter(options))} {next(iter(options.values()))}: "):
        SegNet(11, **options)


@pytest.mark.parametrize("depth", [1, 3])
def test_both_kinds_of_operators_share_their_weights_and_agree(depth):
    torch.manual_seed(0)
    plain = SegNet(11, depth=depth)
    fused = SegNet(11, depth=depth, fused=True)
    fused.load_state_dict(plain.state_dict())
    images = torch.randn(2, 3, 37, 45)
    for training in (True, False):
        plain.train(training), fused.train(training)
        with torch.no_grad():
            torch.testing.assert_close(fused(images), plain(images), rtol=1e-4, atol=1e-4)
    for (name, mine), theirs in zip(fused.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def test_under_autocast_the_fused_operators_keep_the_convolutions_dtype():
    network, seen = SegNet(11, depth=2, fused=True), []
    for conv in convolutions(network):
        conv.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0].dtype, output.dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        scores = network(torch.randn(2, 3, 9, 10))
    assert seen[1:] == [(torch.bfloat16, torch.bfloat16)] * (len(seen) - 1)
    scores.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in network.parameters())


class Layouts(TorchDispatchMode):
    """Operators that gave a feature map of the batch: channels-last ones and others."""

    def __init__(self):
        super().__init__()
        self.channels_last, self.others = set(), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.dim() == 4 and tensor.shape[0] == 2:
                kept = tensor.is_contiguous(memory_format=torch.channels_last)
                (self.channels_last if kept else self.others).add(str(func).removesuffix(".default"))
        return result


@pytest.mark.parametrize("fused", [True, False])
def test_on_a_gpu_only_pytorchs_unpooling_leaves_channels_last(fused):
    # Nothing is computed: fake tensors know the strides that CUDA's kernels give. In fp16, since without a GPU torch
    # takes bf16 for unsupported by cuDNN.
    with FakeTensorMode(), torch.device("cuda"):
        network = SegNet(11, fused=fused)
        for parameter in network.parameters():
            parameter.data = parameter.data.half()
            if parameter.dim() == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        images = torch.empty(2, 3, 360, 480, dtype=torch.float16).contiguous(memory_format=torch.channels_last)
        with Layouts() as layouts:
            network(images)
    if fused:
        operators = {"fastseg.bn_relu", "fastseg.bn_relu_pool", "fastseg.unpool", "aten.convolution"}
        assert (layouts.channels_last, layouts.others) == (operators, set())
    else:
        assert layouts.others == {"aten.max_unpool2d"}
        assert "aten.clone" in layouts.channels_last  # the copy that brings it back


def test_weights_start_as_he_et_al_have_them():
    torch.manual_seed(0)
    network = SegNet(11)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    initialise(network, "none")
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    for conv in convolutions(network):
        # The standard deviation of n samples is off by 1 / sqrt(2 n) of itself; 5 of these.
        slack = 5 / (2 * conv.weight.numel()) ** 0.5
        assert conv.weight.std().item() == pytest.approx((2 / (9 * conv.in_channels)) ** 0.5, rel=slack)
    assert not convolutions(network)[-1].bias.any()


def test_identity_lets_convolutions_pass_on_what_they_get_and_leaves_he_the_rest():
    torch.manual_seed(0)
    network = SegNet(11)
    he = [conv.weight.clone() for conv in convolutions(network)]
    initialise(network, "identity")
    first, *between, last = convolutions(network)
    assert torch.equal(first.weight, he[0])
    assert not last.weight.any()
    widths = [(conv.in_channels, conv.out_channels) for conv in between]
    assert {(64, 64), (64, 128), (256, 256), (512, 256), (512, 512)} <= set(widths)
    after_unpooling = {next(layers.children()) for layers in network.decoder}
    for conv, before in zip(between, he[1:-1], strict=True):
        if conv in after_unpooling:
            continue
        x = torch.randn(1, conv.in_channels, 3, 4)
        both = min(conv.in_channels, conv.out_channels)
        assert torch.equal(conv(x)[:, :both], x[:, :both])
        assert torch.equal(conv.weight[both:], before[both:])


def test_identity_fills_what_unpooling_leaves_empty_by_bilinear_interpolation():
    network = SegNet(11)
    initialise(network, "identity")
    ramp = torch.arange(5.0) + 10 * torch.arange(4.0)[:, None]
    for layers in network.decoder:
        conv = next(layers.children())
        unpooled = torch.zeros(1, conv.in_channels, 8, 10)
        unpooled[:, ::2, ::2, ::2] = ramp  # into every second channel, to see that they do not mix
        filled = conv(unpooled)
        # Linear between the samples: half a step of the ramp from pixel to pixel; beyond the last ones is nothing.
        wanted = torch.arange(9.0) / 2 + 10 * torch.arange(7.0)[:, None] / 2
        assert torch.equal(filled[0, ::2, :7, :9], wanted.expand(conv.out_channels // 2, 7, 9))
        assert not filled[0, 1::2].any()


@functools.cache
def random_vgg(name: str) -> nn.Module:
    """torchvision's VGG with random features, biases and statistics; its classifier, 0.5 GB, stays without memory."""
    with torch.device("meta"):
        vgg = getattr(torchvision.models, name)(weights=None, init_weights=False)
    vgg.features.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for layer in vgg.features:
        if isinstance(layer, nn.Conv2d):
            layer.weight.data.normal_(0, (2 / layer.weight[0].numel()) ** 0.5, generator=generator)
            layer.bias.data.normal_(0, 0.3, generator=generator)
        elif isinstance(layer, nn.BatchNorm2d):
            for value in (layer.weight.data, layer.running_var):
                value.uniform_(0.5, 1.5, generator=generator)
            for value in (layer.bias.data, layer.running_mean):
                value.normal_(0, 0.3, generator=generator)
            layer.num_batches_tracked.fill_(7)
    return vgg.eval()


@torch.no_grad()
def vgg_stages(vgg: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """What goes into each pooling layer, and what comes out of the last."""
    found = []
    for layer in vgg.features:
        if isinstance(layer, nn.MaxPool2d):
            found.append(x.clone())
        x = layer(x)
    return [*found, x]


@torch.no_grad()
def encoder_stages(model: SegNet, x: torch.Tensor) -> list[torch.Tensor]:
    found = []
    for stage in model.eval().encoder:
        found.append(stage(x))
        x = torch_pool(found[-1])[0]
    return [*found, x]


@pytest.mark.parametrize(
    ("name", "depth"), [("vgg16", 1), ("vgg16_bn", 3), ("vgg16", 5), ("vgg16_bn", 5), ("vgg19_bn", 5)]
)
def test_the_encoders_features_are_torchvisions(name, depth):
    vgg = random_vgg(name)
    model = meta_segnet(backbone=name.removesuffix("_bn"), depth=depth).to_empty(device="cpu")
    load_vgg(model, vgg.state_dict(), name)
    images = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    found, wanted = encoder_stages(model, images), vgg_stages(vgg, images)
    for mine, theirs in zip(found[:depth], wanted, strict=False):
        assert theirs.std() > 0.1
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5 * theirs.max().item())
    if depth == 5:
        torch.testing.assert_close(found[-1], wanted[-1], rtol=0, atol=1e-5 * wanted[-1].max().item())
    if name.endswith("_bn"):
        assert model.encoder[0][1].num_batches_tracked == 7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features.2.weight": None}, "no key features.2.weight"),
        (
            {"features.0.bias": torch.zeros(7)},
            r"features.0.bias is FloatTensor\[7\], the encoder needs FloatTensor\[64\]",
        ),
        ({"features.1.weight": torch.zeros(64)}, "1 keys that fit nowhere: features.1.weight"),
        ({"head.weight": torch.zeros(1)}, "1 keys that fit nowhere: head.weight"),
        ({"features.extra.weight": torch.zeros(1)}, "1 keys that fit nowhere: features.extra.weight"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_by_its_key(change, message):
    state = {"features.0.weight": torch.zeros(64, 3, 3, 3), "features.2.weight": torch.zeros(64, 64, 3, 3)}
    state |= {"features.0.bias": torch.zeros(64), "features.2.bias": torch.zeros(64)}
    state = {key: value for key, value in (state | change).items() if value is not None}
    with pytest.raises(FastsegError, match=message) as error:
        load_vgg(SegNet(3, depth=1), state, "some.pth")
    assert str(error.value).startswith("some.pth: ")


def test_the_whole_encoder_leaves_no_key_of_a_deeper_network_over():
    vgg = random_vgg("vgg16")
    state = vgg.state_dict() | {"features.31.weight": torch.zeros(1)}
    with pytest.raises(FastsegError, match=r"1 keys that fit nowhere: features\.31\.weight"):
        load_vgg(meta_segnet().to_empty(device="cpu"), state, "vgg16")


def test_a_file_of_weights_starts_the_encoder(tmp_path):
    vgg, model = random_vgg("vgg16"), SegNet(3, depth=2)
    torch.save({k: v for k, v in vgg.state_dict().items() if k.startswith("features.")}, tmp_path / "vgg.pth")
    initialise(model, str(tmp_path / "vgg.pth"))
    assert torch.equal(model.encoder[1][3].weight, vgg.features[7].weight)


def test_a_missing_file_names_the_choices(tmp_path):
    with pytest.raises(UsageError, match=r"--init .*vgg\.pth: no such file; give none, identity, vgg16,") as error:
        initialise(SegNet(3, depth=1), str(tmp_path / "vgg.pth"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"junk, no weights", b"PK\x03\x04junk", "tensor", "numbers", "module"])
def test_a_file_that_holds_no_weights_is_one_line(tmp_path, content):
    path = tmp_path / "vgg.pth"
    things = {"tensor": torch.zeros(3), "numbers": {"features.0.weight": 3}, "module": nn.Conv2d(3, 64, 3)}
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(things[content], path)
    with pytest.raises(FastsegError, match=r"--init .*vgg\.pth: ") as error:
        initialise(SegNet(3, depth=1), str(path))
    assert "\n" not in str(error.value)


@pytest.fixture
def published(tmp_path, monkeypatch):
    """published(contents) stands for torchvision's published VGG-16, under a name that tells its digest or another."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))

    def publish(contents: object, digest: str | None = None) -> None:
        torch.save(contents, tmp_path / "it.pth")
        digest = digest or hashlib.sha256((tmp_path / "it.pth").read_bytes()).hexdigest()[:8]
        path = (tmp_path / "it.pth").rename(tmp_path / f"vgg16-{digest}.pth")
        monkeypatch.setattr(torchvision.models.VGG16_Weights.IMAGENET1K_V1.value, "url", path.as_uri())

    return publish


def test_downloaded_weights_start_the_encoder(published):
    vgg, model = random_vgg("vgg16"), SegNet(3, depth=1)
    published({k: v for k, v in vgg.state_dict().items() if k.startswith("features.")})
    initialise(model, "vgg16")
    assert torch.equal(model.encoder[0][0].weight, vgg.features[0].weight)


class Evil:
    """An object that does something as it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("evil",)


def test_what_is_downloaded_is_compared_with_its_digest_and_makes_no_objects(published, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for contents, digest, why in (({}, "00000000", "invalid hash value"), ({"features.0.weight": Evil()}, None, "")):
        published(contents, digest)
        with pytest.raises(UsageError, match=rf"^--init vgg16: its weights could not be had \(.*{why}") as error:
            initialise(SegNet(3, depth=1), "vgg16")
        assert "\n" not in str(error.value)
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("failure", [urllib.error.URLError("no route to host"), TimeoutError("timed out")])
def test_a_download_that_fails_names_the_two_ways_out(monkeypatch, failure):
    def unreachable(*_, **__):
        raise failure

    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", unreachable)
    with pytest.raises(UsageError, match=r"--init vgg16: .*(no route to host|timed out)") as error:
        initialise(SegNet(3, depth=1), "vgg16")
    assert "--init FILE" in str(error.value)
    assert "--init none" in str(error.value)
    assert "\n" not in str(error.value)
