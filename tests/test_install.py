"""What fastseg prints and documents to install: our own clone or wheel, or what we depend on, never a stranger's.

`fastseg` on the package index is another project, so that a line that names it installs something else.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest

from fastseg import environment

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
SOURCES = ["*.md", "Makefile", "constraints.txt", ".pre-commit-config.yaml", "docs/**/*", "deploy/*"]
SOURCES += [
    f"{folder}/**/*.{end}" for folder in ("fastseg", "pipelines", "kernels", "bench") for end in ("py", "sh", "txt")
]
COMMAND = re.compile(r"pip (?:install|download|wheel)((?:[ ]+(?:'[^']*'|\"[^\"]*\"|[^\s'\"`;,(){}&|]+))*)")
WITH_VALUE = {"-c", "-d", "--target", "--wheel-dir"}


def normal(name: str) -> str:
    """A project's name as indexes compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def project_of(requirement: str) -> str:
    return normal(re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0])


def dependencies() -> set[str]:
    """All that our extras and dependencies name, and what those that are installed here need in turn."""
    found: set[str] = set()
    ahead = [project_of(r) for r in (*PROJECT["dependencies"], *(r for extra in EXTRAS.values() for r in extra))]
    while ahead:
        name = ahead.pop()
        if name not in found:
            found.add(name)
            try:
                ahead += [project_of(r) for r in requires(name) or ()]
            except PackageNotFoundError:
                continue  # of an extra that is not installed
    return found


def wanted(text: str) -> Iterator[str]:
    """What the pip commands in a text are to install: requirements, files and folders."""
    for arguments in COMMAND.findall(text.replace("\\\n", " ")):
        words = iter(re.findall(r"'[^']*'|\"[^\"]*\"|\S+", arguments))
        for word in words:
            if word in WITH_VALUE:
                next(words)
            elif word == "-r":
                lines = (ROOT / next(words)).read_text(encoding="utf-8").splitlines()
                yield from (line for line in lines if line and not line.startswith("#"))
            elif not word.startswith("-") and word != "$source":  # of bench/device.sh: where to look
                yield word.strip("'\"")


def foreign(requirement: str, known: set[str]) -> str | None:
    """Why a requirement is none of ours, or None where it is."""
    place, _, extras = requirement.rstrip("]").partition("[")
    local = place.startswith((".", "/", "$")) or place.endswith(".whl")
    if local:
        given = [extra for extra in extras.split(",") if extra and extra != "{extra}"]  # environment.install's own
        return next((f"no extra {extra}" for extra in given if extra not in EXTRAS), None)
    return None if project_of(requirement) in known else "no dependency of ours"


def texts() -> dict[str, str]:
    files = {path for pattern in SOURCES for path in ROOT.glob(pattern) if path.is_file() and path.suffix != ".png"}
    return {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in sorted(files)}


@pytest.mark.parametrize(
    ("line", "found", "bad"),
    [
        ("`pip install 'fastseg[dali]'` (Linux)", ["fastseg[dali]"], ["fastseg[dali]"]),
        ("pip install fastseg-trainer", ["fastseg-trainer"], ["fastseg-trainer"]),
        ("pip install --quiet -c constraints.txt -e '.[dali,dev]'; true", [".[dali,dev]"], []),
        ('cure = "pip install --force-reinstall torch torchvision, so that"', ["torch", "torchvision"], []),
        ('pip install "$(ls dist/*.whl)[daly]"', ["$(ls dist/*.whl)[daly]"], ["$(ls dist/*.whl)[daly]"]),
        ("pip install a \\\n    b && rm c", ["a", "b"], ["a", "b"]),
    ],
)
def test_these_tests_know_a_foreign_project(line, found, bad):
    known = dependencies()
    assert list(wanted(line)) == found
    assert [requirement for requirement in found if foreign(requirement, known)] == bad


def test_nothing_that_is_printed_or_documented_installs_another_project():
    known = dependencies()
    assert {"torch", "triton", "nvidia-dali-cuda130", "mdurl"} <= known
    assert normal(PROJECT["name"]) == environment.DISTRIBUTION
    found = {name: list(wanted(text)) for name, text in texts().items()}
    assert {name for name, lines in found.items() if lines} >= {
        "README.md", "docs/predict.md", "deploy/Dockerfile", "Makefile", "bench/device.sh", "fastseg/doctor.py",
    }  # fmt: skip
    wrong = [(name, line, why) for name, lines in found.items() for line in lines if (why := foreign(line, known))]
    assert wrong == []


def test_every_extra_that_the_code_offers_exists():
    asked = [extra for text in texts().values() for extra in re.findall(r"""\binstall\(['"](\w+)['"]\)""", text)]
    assert {"dali", "onnx", "remote", "peers"} <= set(asked) <= EXTRAS.keys()


@pytest.fixture
def installed_from(tmp_path, monkeypatch):
    """installed_from(url, ...) puts metadata of ours that notes where it came from before all others."""

    def note(url: str, **more: object) -> None:
        folder = tmp_path / "site" / "fastseg_trainer-0.1.0.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: fastseg-trainer\nVersion: 0.1.0\n")
        (folder / "direct_url.json").write_text(json.dumps({"url": url, **more}))
        monkeypatch.setattr(sys, "path", [str(tmp_path / "site")])

    return note


def test_an_extra_comes_from_where_fastseg_came_from(installed_from, tmp_path):
    clone = tmp_path / "my clone"
    clone.mkdir()
    installed_from(clone.as_uri(), dir_info={"editable": True})
    assert environment.install("dali") == f"pip install -e '{clone}[dali]'"


def test_an_extra_of_a_wheel_comes_from_the_wheel(installed_from, tmp_path):
    wheel = tmp_path / "fastseg_trainer-0.1.0-py3-none-any.whl"
    wheel.touch()
    installed_from(wheel.as_uri(), archive_info={})
    assert environment.install("onnx") == f"pip install '{wheel}[onnx]'"


@pytest.mark.parametrize("url", ["file:///gone/fastseg", "https://host.example/tmp"])
def test_where_that_is_not_here_an_extra_comes_from_a_clone(installed_from, url):
    installed_from(url, dir_info={})
    assert environment.install("dali") == "in a clone of fastseg: pip install '.[dali]'"


@pytest.mark.slow
def test_the_readmes_lines_install_our_own_distribution(tmp_path):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```sh\n(.*?)^```", readme, re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("pip ")]
    assert [line.split()[1] for line in lines] == ["install", "wheel", "install"]
    clone, report = tmp_path / "clone", tmp_path / "report.json"
    others = shutil.ignore_patterns(".git", ".venv", "build", "dist", "runs", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, clone, ignore=others)
    # As they stand, but that nothing is fetched or installed: not even setuptools, which builds.
    offline = {"NO_INDEX": "1", "NO_DEPS": "1", "NO_BUILD_ISOLATION": "0", "DISABLE_PIP_VERSION_CHECK": "1"}
    dry = {"DRY_RUN": "1", "IGNORE_INSTALLED": "1", "REPORT": str(report)}
    env = {f"PIP_{name}": value for name, value in (offline | dry).items()}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for line in lines:
        report.unlink(missing_ok=True)
        done = subprocess.run(
            ["bash", "-c", line], cwd=clone, env=os.environ | env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{line}\n{done.stderr}"
        if " install " in line:
            (item,) = json.loads(report.read_text())["install"]
            assert (item["metadata"]["name"], item["requested_extras"]) == ("fastseg-trainer", ["dali"])
