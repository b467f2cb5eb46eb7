"""The house: arrows between modules, the public API, what is packed, and the container files."""

import ast
import doctest
import graphlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = {
    "fastseg": "fastseg",
    "pipelines": "fastseg.pipelines",
    "kernels": "fastseg.kernels",
    "bench": "fastseg.bench",
}
CONTAINERS = sorted((ROOT / "deploy").glob("Dockerfile*"))

# All that data sets, the data path and the operators may know of the trainer: data types, texts and files, and
# questions to the machine; and of one another the definition of resizing, which is NumPy alone.
PLAIN = {"fastseg.pipelines.resize"} | {
    f"fastseg.{name}"
    for name in ("choice", "config", "environment", "errors", "workers", "ranges", "runs", "signals", "texts")
}
LOWER = {"data", "pipelines", "kernels", "distributed"}
# What else each part of the trainer may import, beside those and the plain ones.
TRAINER: dict[str, set[str] | frozenset[str]] = {
    **dict.fromkeys(
        ("choice", "errors", "texts", "environment", "workers", "ranges", "config", "runs", "signals"), frozenset()
    ),
    **dict.fromkeys(("boundary", "metrics", "figures", "inputs", "launcher", "memory"), frozenset()),
    **dict.fromkeys(("model", "overlays", "runlog", "tiles"), frozenset()),
    "network": {"model"},
    "specs": {"network"},
    "distributed": {"memory"},
    "report": {"figures"},
    "checkpoint": {"model", "network"},
    "predict": {"checkpoint", "inputs", "results", "tiles"},
    "results": {"overlays"},
    "export": {"checkpoint", "model", "network"},
    "evaluation": {"boundary", "checkpoint", "network", "specs", "metrics", "tiles"},
    "training": {"checkpoint", "evaluation", "specs", "metrics", "model", "network", "overlays", "report", "runlog"},
    "dry_run": {"evaluation", "specs", "memory", "runlog", "training"},
    "find_lr": {"training"},
    "repro": {"network", "specs", "training"},
    "profiling": {"runlog", "training"},
    "diagnosis": {"runlog"},
    "doctor": {"profiling", "training"},
}
# The rooms of training, from the bottom up: each imports those before it alone.
TRAINING = [
    "optim",
    "gradients",
    "stopping",
    "capture",
    "step",
    "run",
    "opening",
    "state",
    "saving",
    "validation",
    "meter",
    "startup",
]
TRAINING += ["setup", "loop"]
# The one name that points up: `fastseg.pipelines.open_source`, looked up when it is used.
UP = ("fastseg.pipelines", "fastseg.specs")


class Import(NamedTuple):
    """One module imports another: when it is imported itself, or `late`, when a function of it is called."""

    source: str
    target: str
    late: bool


def names_of(folder: Path, package: str) -> dict[str, Path]:
    """{module name: file} of a package."""
    found = {}
    for path in folder.rglob("*.py"):
        parts = [package, *path.relative_to(folder).with_suffix("").parts]
        found[".".join(parts).removesuffix(".__init__")] = path
    return found


def imports_in(text: str, source: str, modules: set[str]) -> Iterator[Import]:
    """What a module imports of `modules`; what only type checkers see is left out.

    Importing a module runs its package's `__init__` too, which is not counted: those import what they hold.
    """

    def look(node: ast.AST, late: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(source, name.name, late) for name in node.names if name.name in modules)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source}:{node.lineno}: write the whole name"
            for name in node.names:
                whole = f"{node.module}.{name.name}"
                target = whole if whole in modules else node.module
                if target in modules:
                    yield Import(source, target, late)
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for other in node.orelse:
                yield from look(other, late)
        else:
            late = late or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for child in ast.iter_child_nodes(node):
                yield from look(child, late)

    return look(ast.parse(text), False)


def cycle(imports: list[Import]) -> list[str]:
    """Modules that import one another in a ring before any function is called; empty where there is none."""
    graph: dict[str, set[str]] = {}
    for found in imports:
        if not found.late:
            graph.setdefault(found.source, set()).add(found.target)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


@pytest.fixture(scope="module")
def graph() -> list[Import]:
    """All imports between modules of fastseg."""
    modules: dict[str, Path] = {}
    for folder, package in FOLDERS.items():
        modules |= names_of(ROOT / folder, package)
    assert len(modules) > 70
    assert {"fastseg", "fastseg.cli.options", "fastseg.kernels.pool", "fastseg.bench.peers"} <= set(modules)
    return [
        found for name, path in modules.items() for found in imports_in(path.read_text("utf-8"), name, set(modules))
    ]


def test_imports_are_found_wherever_they_stand():
    text = (
        "import json, a.b\nfrom a import b, x\nif TYPE_CHECKING:\n    import a.late\nelse:\n    import a.c\n"
        "class C:\n    import a.c\n    def f(self):\n        from a.late import g\n"
    )
    assert list(imports_in(text, "m", {"a", "a.b", "a.c", "a.late"})) == [
        ("m", "a.b", False),
        ("m", "a.b", False),
        ("m", "a", False),
        ("m", "a.c", False),
        ("m", "a.c", False),
        ("m", "a.late", True),
    ]


def test_a_ring_is_found_unless_a_function_waits_in_it():
    ring = [Import("a", "b", False), Import("b", "c", False), Import("c", "a", False), Import("b", "d", False)]
    assert set(cycle(ring)) == {"a", "b", "c"}
    assert cycle([*ring[:2], Import("c", "a", True)]) == []


def test_no_modules_import_one_another_in_a_ring(graph):
    assert cycle(graph) == []


def part(module: str) -> str:
    """Which part of fastseg a module belongs to; "" for the trainer."""
    second = f"{module}.".split(".")[1]
    return second if second in ("cli", "bench", "pipelines", "kernels", "data") else ""


def test_arrows_point_one_way(graph):
    below = {"pipelines": {"pipelines", "kernels", "data"}, "kernels": {"kernels", "data"}, "data": {"data"}}
    wrong = []
    for found in graph:
        source, target = part(found.source), part(found.target)
        if target == "cli":
            right = source == "cli" or found.source == "fastseg.__main__"
        elif target == "bench":
            right = source in ("bench", "cli")
        elif source in below:
            right = target in below[source] or found.target in PLAIN or found[:2] == UP
        elif source == "":
            room, other = (f"{name}.".split(".")[1] for name in (found.source, found.target))
            allowed = LOWER | TRAINER.get(room, set()) | {room}
            right = room in ("", "__main__") or not other or other in allowed or found.target in PLAIN
        else:
            right = True  # the command line, and benches, may use all that is not above them
        if not right:
            wrong.append(found)
    assert wrong == []


def test_every_module_of_the_trainer_has_its_place(graph):
    rooms = {name.split(".")[1] for name in {found.source for found in graph} if "." in name and part(name) == ""}
    assert rooms - {"__main__"} <= TRAINER.keys() | {"__main__"}
    assert set(TRAINER) <= {path.stem for path in (ROOT / "fastseg").iterdir()}


def test_the_rooms_of_training_stand_on_one_another(graph):
    inside = "fastseg.training."
    assert {path.stem for path in (ROOT / "fastseg" / "training").glob("*.py")} == {"__init__", *TRAINING}
    arrows = [
        (a.source.removeprefix(inside), a.target.removeprefix(inside)) for a in graph if a.target.startswith(inside)
    ]
    among = [(source, target) for source, target in arrows if source in TRAINING]
    assert len(among) > 20
    assert [arrow for arrow in among if TRAINING.index(arrow[0]) <= TRAINING.index(arrow[1])] == []
    # The step, and what captures it, know of no data set, folder, log or configuration.
    of_step = {found.target for found in graph if found.source in (f"{inside}step", f"{inside}capture")}
    names = (
        "distributed", "errors", "kernels.cross_entropy", "network", "ranges", "training.capture", "training.optim"
    )  # fmt: skip
    assert of_step <= {f"fastseg.{name}" for name in names}


def steps_in(text: str) -> list[int]:
    """Lines on which a loss is sent backward or an optimiser takes its step."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = ast.unparse(node.func.value)
            # `Step.backward` takes images and labels, and a bench of an operator a gradient; a loss at most its scale.
            backward = node.func.attr == "backward" and (not node.args or "scale(" in ast.unparse(node.args[0]))
            if backward or (node.func.attr == "step" and re.search(r"optimi[sz]er|scaler", owner)):
                found.append(node.lineno)
    return found


def test_one_module_takes_steps():
    assert steps_in(
        "loss.backward(scaler.scale(one))\nself.optimizer.step()\nscaler.step(optimizer)\nstep.step(x, y, 1)\n"
    ) == [1, 2, 3]
    found = {}
    for folder, package in FOLDERS.items():
        for name, path in names_of(ROOT / folder, package).items():
            if lines := steps_in(path.read_text("utf-8")):
                found[name] = len(lines)
    # The plain PyTorch loop is what others would write.
    assert found == {"fastseg.training.step": 2, "fastseg.bench.peers.plain_step": 2}


@pytest.mark.slow
def test_the_example_of_the_api_runs_as_it_stands(tmp_path, monkeypatch):
    import fastseg

    monkeypatch.chdir(tmp_path)
    example = doctest.DocTestFinder(recurse=False).find(fastseg, "fastseg")[0]
    assert len(example.examples) >= 10
    said: list[str] = []
    doctest.DocTestRunner().run(example, out=said.append)
    assert said == []


def test_the_api_is_what_it_says_and_types_are_declared():
    code = (
        "import fastseg, sys; assert 'torch' not in sys.modules; fastseg.Config(); assert 'torch' not in sys.modules;"
        "from fastseg.pipelines import open_source; assert open_source is fastseg.pipelines.open_source;"
        "print(*sorted(n for n in fastseg.__all__ if getattr(fastseg, n)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["Config", "evaluate", "load", "load_recipe", "override", "pipelines", "train"], (
        done.stderr
    )


def test_a_source_of_batches_is_the_plans_for_training_and_in_order_otherwise(street):
    from fastseg.errors import FastsegError
    from fastseg.pipelines import open_source
    from fastseg.pipelines.plan import Plan

    how = {"size": (48, 72), "batch": 3, "device": "cpu"}
    batches = open_source(street, seed=7, **how)
    taken = np.concatenate([next(batches).indices for _ in range(16)])  # 48 samples: six epochs of 8
    assert sorted(taken) == sorted([*range(8)] * 6)
    plan = Plan(num_samples=8, batch=3, seed=7, mirror=True, max_shift=(1, 1))  # 10 pixels at 360 rows are 1 at 48
    assert taken[:3].tolist() == plan.global_batch(0).indices.tolist()

    found = list(open_source(street, "val", **(how | {"size": "48x72"})))
    assert [batch.indices.tolist() for batch in found] == [[0, 1, 2], [3]]
    assert [tuple(batch.images.shape) for batch in found] == [(3, 3, 48, 72), (1, 3, 48, 72)]
    assert [tuple(batch.labels.shape) for batch in found] == [(3, 48, 72), (1, 48, 72)]
    with pytest.raises(FastsegError, match="no test split; it has train"):
        open_source(street, "test", **how)


def test_a_source_of_batches_names_a_value_off_the_class_map(png, tmp_path):
    from fastseg.errors import FastsegError
    from fastseg.pipelines import open_source

    for split in ("train", "val"):
        png(f"d/{split}/a.png", np.zeros((32, 32, 3)))
        png(f"d/{split}annot/a.png", np.full((32, 32), 77))
        with pytest.raises(FastsegError, match=rf"{split}annot/a\.png: .*77"):
            list(open_source(tmp_path / "d", split, size=(32, 32), batch=2, device="cpu", loader="reference"))


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> tuple[Path, Path]:
    """(sdist, wheel made of it), from a copy of the sources, since a build writes beside them."""
    pytest.importorskip("build")
    sources, out = (tmp_path_factory.mktemp(name) for name in ("sources", "dist"))
    others = shutil.ignore_patterns(".git", ".venv", "build", "runs", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, sources / "fastseg", ignore=others)
    # Without isolation: an isolated build fetches setuptools anew.
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(sources / "fastseg")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(packed):
    sdist, wheel = packed
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if not name.endswith("/")}
    info = {name for name in inside if ".dist-info/" in name}
    wanted = {
        f"{package.replace('.', '/')}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, package in FOLDERS.items()
        for path in (ROOT / folder).rglob("*.py")
    }
    data = {"py.typed", "recipes/baseline.toml", "recipes/fast.toml", "templates/report.html.j2"}
    data |= {"templates/compare.html.j2", "templates/style.css"}
    assert inside - info == wanted | {f"fastseg/{name}" for name in data}
    assert {Path(name).name for name in info} >= {"METADATA", "RECORD", "entry_points.txt", "LICENSE"}
    assert wheel.stat().st_size < 1_000_000
    assert wheel.name.endswith("-py3-none-any.whl")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "kernels/pool.py", "fastseg/recipes/fast.toml"} <= names
    assert not [name for name in names if name.startswith(("bench/records/", "build/"))]


@pytest.mark.slow
def test_what_is_packed_would_be_taken_by_an_index(packed):
    pytest.importorskip("twine")
    command = [sys.executable, "-m", "twine", "check", "--strict", *map(str, packed)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("PASSED") == 2


@pytest.mark.slow
def test_the_wheel_trains_from_another_folder(packed, tmp_path):
    from fastseg.data.synth import VERSION, write

    target, home = tmp_path / "target", tmp_path / "home"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target)]
    subprocess.run([*pip, str(packed[1])], check=True)
    write(home / f"synth-{VERSION}", counts={"train": 4, "val": 2}, size=(64, 96))
    options = "--data synth --recipe fast --size 32x48 --set model.depth=2 --epochs 1 --device cpu --run first"
    done = subprocess.run(
        [target / "bin" / "fastseg", "train", *options.split()],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(target), "FASTSEG_DATA": str(home)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "first" / "report.html").is_file()


def test_records_are_of_committed_trees():
    records = {path.name: json.loads(path.read_text("utf-8")) for path in (ROOT / "bench" / "records").glob("20*.json")}
    commits = {name: record["environment"].get("commit") for name, record in records.items() if "environment" in record}
    assert len(commits) >= 5
    assert [name for name, commit in commits.items() if commit and commit.endswith("-dirty")] == []


def instructions(path: Path) -> list[tuple[str, str]]:
    """(instruction, its text) of a Dockerfile, comments left out and continued lines joined."""
    lines = [line for line in path.read_text("utf-8").splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", "")
    return [(word, text.strip()) for word, _, text in (line.partition(" ") for line in joined.splitlines() if line)]


@pytest.mark.parametrize("path", CONTAINERS, ids=lambda path: path.name)
def test_a_container_is_no_roots_and_keeps_data_and_runs_outside(path):
    found = instructions(path)
    last = dict(found)  # of instructions that stand several times the last one counts
    assert last["FROM"] == "${BASE}"
    assert json.loads(last["ENTRYPOINT"]) == ["fastseg"]
    assert last["USER"] == "65534:65534"
    assert json.loads(last["VOLUME"]) == ["/data", last["WORKDIR"]] == ["/data", "/work"]
    assert "FASTSEG_DATA=/data" in last["ENV"].split()
    copied = [name for word, text in found if word == "COPY" and "--from" not in text for name in text.split()[:-1]]
    assert {*FOLDERS, "pyproject.toml"} <= set(copied)
    assert [name for name in copied if not (ROOT / name).exists()] == []
    assert [text for word, text in found if word == "RUN" and re.search(r"index-url|find-links|://", text)] == []


def test_nvidias_container_keeps_what_it_brings():
    found = instructions(ROOT / "deploy" / "Dockerfile")
    assert re.fullmatch(r"BASE=nvcr\.io/nvidia/pytorch:\d\d\.\d\d-py3", dict(found)["ARG"])
    installs = [text.partition(" && ")[0].split() for word, text in found if word == "RUN" and "pip install" in text]
    assert len(installs) == 1
    assert "--no-deps" in installs[0]
    assert not {"--upgrade", "-U", "torch", "torchvision", "numpy", "apex"} & set(installs[0])
    assert not any("dali" in word for word in installs[0])


def test_the_linter_of_dockerfiles_finds_nothing():
    linter = Path(sys.executable).with_name("hadolint")
    if not linter.exists():
        pytest.skip("hadolint is not installed: pip install '.[dev]'")
    assert len(CONTAINERS) == 2
    done = subprocess.run([linter, *CONTAINERS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
