"""What fastseg may not do with files that come from elsewhere, and that every dependency is pinned."""

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = [path for folder in ("fastseg", "pipelines", "kernels", "bench") for path in (ROOT / folder).rglob("*.py")]

# A file that any of these reads may run code of its own.
MODULES = {"pickle", "marshal", "shelve", "dill"}
CALLS = {"eval", "exec", "yaml.load", "os.system"}


def offences(text: str) -> Iterator[str]:
    """What in a module's source must not be there, with its line."""
    for node in ast.walk(ast.parse(text)):
        for what in _offences_of(node):
            yield f"{node.lineno}: {what}"


def _offences_of(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (f"import {name.name}" for name in node.names if name.name.partition(".")[0] in MODULES)
    if isinstance(node, ast.ImportFrom) and node.module:
        if node.module.partition(".")[0] in MODULES:
            yield f"from {node.module}"
        # Under another name a call would not be seen.
        named = {f"{node.module}.{name.name}" for name in node.names}
        yield from (f"from {name}" for name in sorted(named & (CALLS | {"torch.load", "numpy.load"})))
    if not isinstance(node, ast.Call):
        return
    name, given = ast.unparse(node.func), {keyword.arg: keyword.value for keyword in node.keywords}
    if name in CALLS:
        yield name
    if "shell" in given and not _is(given["shell"], False):
        yield "shell="
    if name.endswith(".get_state_dict") and not (
        _is(given.get("weights_only"), True) and _is(given.get("check_hash"), True)
    ):
        yield "get_state_dict without weights_only=True and check_hash=True"
    if name == "torch.load" and not _is(given.get("weights_only"), True):
        yield "torch.load without weights_only=True"
    if "allow_pickle" in given and not _is(given["allow_pickle"], False):
        yield "allow_pickle="


def _is(value: ast.expr | None, wanted: bool) -> bool:
    return isinstance(value, ast.Constant) and value.value is wanted


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("import pickle", ["1: import pickle"]),
        ("import json, marshal", ["1: import marshal"]),
        ("import shelve as s", ["1: import shelve"]),
        ("from dill.source import getsource", ["1: from dill.source"]),
        ("def f():\n    return eval('1')", ["2: eval"]),
        ("exec(text)", ["1: exec"]),
        ("yaml.load(file)", ["1: yaml.load"]),
        ("os.system('ls')", ["1: os.system"]),
        ("from os import system", ["1: from os.system"]),
        ("subprocess.run('ls', shell=True)", ["1: shell="]),
        ("subprocess.run('ls', shell=wanted)", ["1: shell="]),
        ("torch.load(path)", ["1: torch.load without weights_only=True"]),
        ("torch.load(path, weights_only=False)", ["1: torch.load without weights_only=True"]),
        ("w.get_state_dict(weights_only=True)", ["1: get_state_dict without weights_only=True and check_hash=True"]),
        ("w.get_state_dict(check_hash=True)", ["1: get_state_dict without weights_only=True and check_hash=True"]),
        ("from torch import load", ["1: from torch.load"]),
        ("np.load(path, allow_pickle=True)", ["1: allow_pickle="]),
        # What is allowed.
        ("import json\ntorch.load(path, weights_only=True)\nnp.load(path)\nmodel.eval()", []),
        ("subprocess.run(['ls'], shell=False)\nnp.load(path, allow_pickle=False)\nyaml.safe_load(file)", []),
    ],
)
def test_the_check_finds_what_it_is_for(text, found):
    assert list(offences(text)) == found


def test_no_file_from_elsewhere_can_run_code():
    assert len(SOURCES) > 60
    assert any("torch.load(" in path.read_text(encoding="utf-8") for path in SOURCES)
    found = [f"{path.relative_to(ROOT)}:{what}" for path in SOURCES for what in offences(path.read_text("utf-8"))]
    assert found == []


def test_every_dependency_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *(w for extra in project["optional-dependencies"].values() for w in extra)]
    names = {normal(re.match(r"[\w.-]+", requirement)[0]) for requirement in wanted}
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert [line for line in pins if not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == []
    pinned = [normal(line.partition("==")[0]) for line in pins]
    assert sorted(set(pinned)) == sorted(pinned)
    assert {"torch", "numpy", "moto", "spdl-core"} <= names
    assert names - set(pinned) == set()


def normal(name: str) -> str:
    """A distribution's name as the index compares them."""
    return re.sub(r"[-_.]+", "-", name).lower()
