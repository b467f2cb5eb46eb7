"""The configuration of a run: one frozen tree of dataclasses, read from a TOML recipe, `--set key=value` and flags.

Each default stands once, here; a recipe states what it changes. A run folder holds the resolved tree as config.toml.
"""

import dataclasses
import difflib
import functools
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import click
import numpy as np
import tomli_w

from fastseg.data.split import check_scheme
from fastseg.data.stats import WEIGHTINGS
from fastseg.errors import UsageError
from fastseg.texts import brief, parse_toml, read_toml, shown
from fastseg.workers import LAUNCHER, is_main

FITS = ("squeeze", "letterbox")
RECIPES = Path(__file__).parent / "recipes"
# Of a side: at this size one image takes 3 GB in fp32, and the first 64 channels of it 69 GB, so that no larger one can
# be trained on; and of a step.
MOST_PIXELS, MOST_IMAGES = 16_384, 1_000_000
MOST_EPOCHS, MOST_THREADS, MOST_SECONDS, MOST_MIB = 1_000_000, 10_000, 100_000_000, 1_000_000


class Size(NamedTuple):
    """Pixels of an image; its text is HEIGHTxWIDTH, as in options and files."""

    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.height}x{self.width}"


def parse_size(value: str | tuple[int, int], least: int = 1) -> Size:
    """The size of "HEIGHTxWIDTH" or (height, width).

    Raises:
        ValueError: not two whole numbers, `least` or more and at most MOST_PIXELS, with an x between them.
    """
    text = value if isinstance(value, str) else "x".join(map(brief, value))
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(p.isdecimal() and len(p) <= 5 and int(p) >= least for p in parts):
        raise ValueError(f"{brief(text)} is no size: write HEIGHTxWIDTH, such as 360x480")
    size = Size(*map(int, parts))
    if max(size) > MOST_PIXELS:
        raise ValueError(f"{size}: at most {MOST_PIXELS} pixels a side; of larger images take windows or tiles")
    return size


def _option(
    default: Any, text: str, choices: tuple[str, ...] = (), least: float | None = None, most: float = math.inf
) -> Any:
    """A field with its meaning, and what its value may be."""
    return field(default=default, metadata={"help": text, "choices": choices, "least": least, "most": most})


class _Checked:
    """Checks every field against what `_option` said of it."""

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):  # type: ignore[arg-type]
            value, choices, least = getattr(self, f.name), f.metadata["choices"], f.metadata["least"]
            if f.type is Size:
                try:
                    object.__setattr__(self, f.name, parse_size(value, least))
                except ValueError as error:
                    raise ValueError(f"{f.name}: {error}") from None
                continue
            if choices and value not in choices:
                near = difflib.get_close_matches(str(value), choices, 1)
                hint = f" (did you mean {near[0]}?)" if near else ""
                raise ValueError(f"{f.name} = {brief(value)}: choose one of {', '.join(choices)}{hint}")
            # Written so that NaN fails too.
            if least is not None and not value >= least:
                raise ValueError(f"{f.name} = {value!r}: {least} or more")
            if value == math.inf:
                raise ValueError(f"{f.name} = inf: a finite number")
            if least is not None and value > f.metadata["most"]:
                raise ValueError(f"{f.name} = {value!r}: {f.metadata['most']} or less")


@dataclass(frozen=True, kw_only=True)
class Data(_Checked):
    path: str = _option("camvid", "camvid, synth, a data set's folder, or a .toml file that describes one")
    size: Size = _option(Size(360, 480), "the network's input, HEIGHTxWIDTH in pixels", least=1)
    split_scheme: str = _option(
        "auto",
        "which pairs train: auto and tutorial keep the data set's own split; where it brings none, auto takes SegNet's "
        "published lists, and tutorial a random 60/40; also segnet, video, random-60-40 and random:A-B",
    )
    exif: str = _option("ignore", "turn images and labels as their EXIF orientation says", ("ignore", "apply"))
    fit: str = _option(
        "squeeze",
        "how images of another shape get `size`: squeeze, or letterbox, which keeps their shape, with black and void "
        "around it",
        FITS,
    )
    unknown_colours: str = _option("error", "label values outside the class map", ("error", "void"))

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            check_scheme(self.split_scheme)
        except ValueError as error:
            raise ValueError(f"split_scheme = {brief(self.split_scheme)}: {error}") from None


@dataclass(frozen=True, kw_only=True)
class Augment(_Checked):
    mirror: bool = _option(True, "mirror half of the training samples left-right")
    translate: int = _option(
        10, "largest shift each way, in pixels at 360 rows; scales with the height", least=0, most=MOST_PIXELS
    )
    crop: Size = _option(
        Size(0, 0), "train on random windows of this size, for large images; 0x0: whole images", least=0
    )
    scale: float = _option(
        1.0, "show images between 1/scale and scale times as large, log-uniformly; 1: as they are", least=1
    )
    colour: float = _option(
        0.0,
        "change brightness, contrast and saturation by up to this share each way, and hue by as much of 36 degrees; "
        "0: none",
        least=0,
        most=1,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.crop[0] > 0) != (self.crop[1] > 0):
            raise ValueError(f"crop = {self.crop}: two positive numbers, or 0x0 for whole images")

    def max_shift(self, size: Size) -> tuple[int, int]:
        """The largest shift (rows, columns) in pixels at this input size."""
        pixels = round(self.translate * size[0] / 360)
        return pixels, pixels


@dataclass(frozen=True, kw_only=True)
class Model(_Checked):
    network: str = _option("segnet", "segnet, or package.module:function of your own, which gives a network")
    backbone: str = _option("vgg16", "SegNet: whose convolutions make the encoder", ("vgg16", "vgg19"))
    depth: int = _option(5, "SegNet: encoder stages, 1 to 5", least=1, most=5)
    init: str = _option(
        "none",
        "first weights: none (SegNet: He et al.; else the network's own), a checkpoint, a file, or for SegNet identity "
        "or a torchvision VGG (encoder)",
    )


@dataclass(frozen=True, kw_only=True)
class Train(_Checked):
    epochs: int = _option(100, "passes over the training images", least=1, most=MOST_EPOCHS)
    max_steps: int = _option(0, "end after so many optimiser steps, inside an epoch too; 0: after the epochs", least=0)
    batch: int = _option(
        4, "images per device and backward pass; 0: follows from global_batch", least=0, most=MOST_IMAGES
    )
    accumulate: int = _option(1, "backward passes per optimiser step", least=1, most=MOST_IMAGES)
    global_batch: int = _option(
        0, "images per step of all devices together; 0: batch x devices", least=0, most=MOST_IMAGES
    )
    drop_remainder: bool = _option(False, "end each epoch with its last full batch, instead of batches across epochs")
    weighting: str = _option("median-frequency", "class weights of the loss", WEIGHTINGS)
    optimizer: str = _option("auto", "which SGD: auto is apex where it fits, else torch", ("auto", "apex", "torch"))
    lr: float = _option(1e-3, "learning rate; the highest of the schedule", least=0)
    momentum: float = _option(0.9, "of SGD", least=0)
    nesterov: bool = _option(False, "momentum looks a step ahead (Sutskever et al. 2013)")
    weight_decay: float = _option(5e-4, "L2", least=0)
    decay_norms: bool = _option(True, "weight decay on batch norms and biases too")
    schedule: str = _option("constant", "the learning rate over the run", ("constant", "step", "poly", "one-cycle"))
    lr_scaling: str = _option("none", "lr grows with the global batch", ("none", "linear", "sqrt"))
    lr_batch: int = _option(4, "the global batch that lr is meant for, where lr_scaling scales from", least=1)
    lr_warmup_epochs: float = _option(
        5.0, "epochs in which a scaled rate grows from lr; one-cycle has its own", least=0
    )
    warmup: float = _option(0.3, "one-cycle: share of the run in which the learning rate rises", least=0)
    step_epochs: int = _option(30, "step: epochs between two drops", least=1)
    step_factor: float = _option(0.1, "step: what each drop multiplies by", least=0)
    power: float = _option(0.9, "poly: (1 - progress) to this power", least=0)
    scale: float = _option(
        0.0,
        "train on random windows of the files' own pixels, made so many times as large, in batches of data.size; they "
        "are not moved by augment.translate; 0: on whole images",
        least=0,
    )
    grow_from: float = _option(1.0, "progressive resizing: the first images, as a share of data.size; 1: none", least=0)
    grow_share: float = _option(0.6, "share of the run in which images grow to data.size", least=0)
    clip: float = _option(0.0, "largest norm of the gradient; 0 leaves it alone", least=0)
    ema: float = _option(0.0, "decay per step of the averaged weights that are evaluated; 0 for none", least=0)
    validate_every: int = _option(1, "epochs between validations; each also writes a checkpoint", least=1)
    patience: int = _option(0, "stop after so many validations without a better mIoU; 0 never", least=0)
    checkpoint_steps: int = _option(0, "steps between checkpoints inside epochs; 0 for none", least=0)
    checkpoint_minutes: float = _option(0.0, "the same in minutes", least=0)
    keep_every: int = _option(0, "keep a checkpoint of every so many epochs beside last and best; 0 for none", least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.batch > 0) == (self.global_batch > 0):
            raise ValueError(
                f"batch = {self.batch} and train.global_batch = {self.global_batch}: give one of them, the other is 0"
            )
        if not self.warmup < 1 or not self.ema < 1 or not self.momentum < 1:
            raise ValueError("warmup, ema and momentum: below 1")
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov = true: wants a momentum above 0")
        if not 0 < self.grow_from <= 1 or not self.grow_share < 1:
            raise ValueError("grow_from: above 0, at most 1; grow_share: below 1")
        if self.keep_every % self.validate_every:
            raise ValueError(
                f"keep_every = {self.keep_every}: a multiple of validate_every, since that is when it saves"
            )


@dataclass(frozen=True, kw_only=True)
class Runtime(_Checked):
    seed: int = _option(0, "of the sample plan, the split and the initial weights", least=0)
    device: str = _option("auto", "auto is cuda where there is a GPU", ("auto", "cpu", "cuda"))
    dtype: str = _option(
        "fp32", "auto is the fastest that the device does well", ("auto", "bf16", "fp16", "tf32", "fp32")
    )
    loader: str = _option(
        "auto",
        "where batches come from: auto is cache where the data fits into memory, else dali where it reads the files",
        ("auto", "dali", "cache", "reference"),
    )
    cache_dir: str = _option("", "folder that keeps decoded data from run to run; empty: memory, for this run")
    kernels: str = _option(
        "auto", "operators between convolutions: auto is fused on a GPU that runs Triton", ("auto", "fused", "torch")
    )
    capture: str = _option(
        "auto", "replay passes from a CUDA graph: auto does on a GPU where nothing is in the way", ("auto", "on", "off")
    )
    threads: int = _option(0, "CPU threads per process; 0 shares the cores out", least=0, most=MOST_THREADS)
    sync_bn: bool = _option(False, "batch norm over the batches of all GPUs together")
    deterministic: bool = _option(False, "the same bits from run to run on a GPU too, slower")
    bucket_mib: int = _option(25, "gradients of so many MiB travel together", least=1, most=MOST_MIB)
    compress: str = _option("none", "precision of gradients between processes", ("none", "bf16"))
    collective_timeout: int = _option(600, "seconds that processes wait for one another", least=1, most=MOST_SECONDS)
    log_every: int = _option(10, "steps between two log lines", least=1)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that decides a run. Keys are written SECTION.FIELD, as in config.toml."""

    data: Data = field(default_factory=Data)
    augment: Augment = field(default_factory=Augment)
    model: Model = field(default_factory=Model)
    train: Train = field(default_factory=Train)
    runtime: Runtime = field(default_factory=Runtime)

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """Plain values by section, as TOML and checkpoints hold them."""
        tree = dataclasses.asdict(self)
        for section, name in (("data", "size"), ("augment", "crop")):
            tree[section][name] = str(tree[section][name])
        return tree

    def dumps(self) -> str:
        """The tree as TOML."""
        return tomli_w.dumps(self.as_dict())


SECTIONS: dict[str, type] = get_type_hints(Config)


def _converted(value: Any, wanted: Any, key: str) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if wanted is str and isinstance(value, os.PathLike):
        value = os.fspath(value)
    if wanted is Size:
        if isinstance(value, str):  # which its section parses
            return value
        if isinstance(value, tuple) or (isinstance(value, np.ndarray) and value.shape == (2,)):
            return tuple(side.item() if isinstance(side, np.generic) else side for side in value)
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:  # a checkpoint may hold what TOML may not
        raise UsageError(f"{key}: wants a number of at most 64 bits")
    elif wanted is float and type(value) is int:
        return float(value)
    elif type(value) is wanted:
        return value
    names = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}
    raise UsageError(f"{key} = {brief(value)}: wants {names.get(wanted, 'a size such as 360x480')}")


@functools.cache  # once, however often a command reads configurations
def _say_renamed() -> None:
    """Tell, in the one process that talks, that a configuration has the old name of a tier."""
    if is_main() and LAUNCHER not in os.environ:  # fastseg's launcher has told it
        click.echo("runtime.loader: torchvision is called reference now", err=True)


def override(config: Config, changes: dict[str, Any], source: str = "--set") -> Config:
    """A config with {"section.field": value} changed.

    A batch per device takes the place of one of all devices together, and the other way round. Another network begins
    with the defaults of its section: a recipe's are of the network that it was written for.

    Raises:
        UsageError: an unknown key or a value that does not fit; it names `source` (a file or an option) and the key.
    """
    known = [f"{name}.{f.name}" for name, cls in SECTIONS.items() for f in dataclasses.fields(cls)]
    sections: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
    for key, value in changes.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"; did you mean {near[0]}?" if near else f"; sections are {', '.join(SECTIONS)}"
            raise UsageError(f"{source}: unknown key {shown(key)}{hint}")
        if key == "runtime.loader" and value == "torchvision":
            value = "reference"
            _say_renamed()
        section, name = key.split(".")
        wanted = get_type_hints(SECTIONS[section])[name]
        sections[section][name] = _converted(value, wanted, f"{source}: {key}")
    train = sections["train"]
    for asked, other in (("batch", "global_batch"), ("global_batch", "batch")):
        if train.get(asked) and other not in train:
            train[other] = 0
    if sections["model"].get("network", config.model.network) != config.model.network:
        config = dataclasses.replace(config, model=Model())
    parts = {}
    for section, new in sections.items():
        try:
            parts[section] = dataclasses.replace(getattr(config, section), **new)
        except ValueError as error:
            raise UsageError(f"{source}: {section}.{error}") from None
    return Config(**parts)


def from_dict(tree: dict[str, Any], source: str) -> Config:
    """The defaults with a {section: {field: value}} tree laid over them.

    Raises:
        UsageError: as `override`.
    """
    changes: dict[str, Any] = {}
    if not isinstance(tree, dict):
        raise UsageError(f"{source}: holds no configuration; sections are {', '.join(SECTIONS)}")
    for section, values in tree.items():
        if not isinstance(values, dict):
            raise UsageError(f"{source}: {shown(section)} is no section; sections are {', '.join(SECTIONS)}")
        changes |= {f"{section}.{name}": value for name, value in values.items()}
    # Runs of before held both: the recipe's batch, and the global batch, which alone counted.
    if all(type(size := changes.get(f"train.{name}")) is int and size > 0 for name in ("batch", "global_batch")):
        changes["train.batch"] = 0
    return override(Config(), changes, source)


def read(path: Path) -> Config:
    """The config of a TOML file over the defaults.

    Raises:
        UsageError: a file that cannot be read or is not TOML, or as `override`.
    """
    return from_dict(read_toml(path), shown(path))


def recipes() -> list[str]:
    """Names of the recipes that come with fastseg."""
    return sorted(p.stem for p in RECIPES.glob("*.toml"))


def load_recipe(recipe: str) -> Config:
    """The config of a recipe by name, or of a TOML file by path."""
    if recipe in recipes():
        return read(RECIPES / f"{recipe}.toml")
    if Path(recipe).suffix == ".toml":
        return read(Path(os.path.expanduser(recipe)))
    raise UsageError(f"--recipe {recipe}: choose one of {', '.join(recipes())}, or give a .toml file")


def assignments(pairs: tuple[str, ...]) -> dict[str, Any]:
    """{"section.field": value} of `--set section.field=value` texts; values are TOML, or else plain text."""
    changes: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals:
            raise UsageError(f"--set {shown(pair)}: write KEY=VALUE, such as train.lr=0.01")
        try:
            changes[key.strip()] = parse_toml(f"v = {text}")["v"]
        except ValueError:
            changes[key.strip()] = text
    return changes


def differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """{"section.field": (old, new)} of the values that differ, as config.toml has them."""
    before, after = old.as_dict(), new.as_dict()
    return {
        f"{section}.{name}": (value, after[section][name])
        for section, values in before.items()
        for name, value in values.items()
        if value != after[section][name]
    }
