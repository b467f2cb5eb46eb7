"""`fastseg train --dry-run`: estimates worked by hand, and nothing left behind."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from fastseg import dry_run
from fastseg.cli import main
from fastseg.dry_run import Measured, estimate, largest_that_fits
from fastseg.memory import momenta, peak_bytes

ROWS = [Measured(1, 1.0, 100.0, True), Measured(4, 2.5, 160.0, True), Measured(8, 4.0, 320.0, True)]


def test_other_batches_lie_on_the_line_through_the_two_nearest():
    assert estimate(ROWS, 4) == ROWS[1]
    assert estimate(ROWS, 2) == Measured(2, 1.5, 120.0, False)
    assert estimate(ROWS, 6) == Measured(6, 3.25, 240.0, False)
    assert estimate(ROWS, 16) == Measured(16, 7.0, 640.0, False)
    assert estimate(ROWS[:1], 3) == Measured(3, 3.0, 300.0, False)


@pytest.mark.parametrize(
    ("available", "largest"), [(99, 0), (100, 1), (159, 3), (320, 8), (359, 8), (360, 9), (4320, 108)]
)
def test_the_largest_batch_that_fits(available, largest):
    assert largest_that_fits(ROWS, available) == largest


def test_peak_memory_counts_what_is_held_and_what_comes_on_top():
    device, held = torch.device("cpu"), torch.zeros(1000, 1000)

    def work() -> torch.Tensor:
        doubled = held * 2
        result = (doubled + 1).to(torch.float64)  # 4 + 4 + 8 MB at once
        del doubled
        return result

    assert peak_bytes(work, [held], device) == pytest.approx(4e6 + 16e6, rel=1e-3)
    weight = torch.nn.Parameter(torch.ones(10))
    optimizer = torch.optim.SGD([weight], lr=1.0, momentum=0.9)
    assert momenta(optimizer) == []
    weight.sum().backward()
    optimizer.step()
    assert [m.tolist() for m in momenta(optimizer)] == [[1.0] * 10]


TINY = ["--recipe", "fast", "--size", "32x48", "--set", "model.depth=1", "--set", "train.grow_from=1"]
TINY += ["--device", "cpu", "--dry-run"]


def invoke(*words: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, ["train", *map(str, words)])
    return result.exit_code, result.stdout, result.stderr


def test_a_dry_run_counts_measures_and_writes_nothing(street, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = invoke(
        "--data",
        street,
        *TINY,
        "--batch",
        3,
        "--epochs",
        5,
        "--epochs",
        "5",
        "--set",
        "train.validate_every=2",
        "--cache-dir",
        "kept",
        "--json",
    )
    assert code == 0, err
    document = json.loads(out)
    # 8 images in batches of 3: 5 epochs are 13 steps; validations after epochs 2, 4 and 5.
    assert (document["steps"], document["batch"], document["validations"]) == (13, 3, 3)
    rows = {row["batch"]: row for row in document["batches"]}
    assert {1, 2, 3, 4, 8, document["largest_batch"]} - rows.keys() <= {document["largest_batch"]}
    assert [rows[batch]["measured"] for batch in (1, 2, 3, 4)] == [True, False, True, False]
    seconds = 13 * rows[3]["step_ms"] / 1e3 + 3 * document["validation_seconds"]
    assert document["total_seconds"] == pytest.approx(seconds)
    assert rows[3]["img_per_s"] == pytest.approx(3e3 / rows[3]["step_ms"])
    assert "reference" in document["start"]["loader"] or "dali" in document["start"]["loader"]
    assert list(Path.cwd().iterdir()) == []


def test_processes_share_the_steps_and_short_runs_validate_less(street, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        dry_run, "measure", lambda step, size, accumulate, batch: Measured(batch, 0.5 * batch, 1e6 * batch, True)
    )
    monkeypatch.setattr(dry_run, "free_bytes", lambda device: 6_500_000)
    words = ["--data", street, *TINY, "--batch", 2, "--epochs", 4, "--nproc", 2, "--set", "train.accumulate=2"]
    code, out, err = invoke(*words, "--set", "train.max_steps=3")
    assert code == 0, err
    lines = out.splitlines()
    assert "batch      8 = 2 x 2 x 2 accumulated" in lines
    assert "One process alone, times their number; what they tell one another is left out:" in lines
    assert "      2   1000.0 ms       8.0       2 MiB  measured, configured" in lines
    assert "      6   3000.0 ms       8.0       6 MiB  estimated" in lines
    assert "the largest batch that fits into 0.0 GiB: 6" in lines
    # Each epoch is a step; the run ends after three.
    assert lines[-1].startswith("3 steps and 3 validations of")


def test_a_gpu_without_room_ends_the_table(street, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def measure(step, size, accumulate, batch):
        if batch > 4:
            raise torch.OutOfMemoryError
        return Measured(batch, 0.5, 1e6 * batch, True)

    monkeypatch.setattr(dry_run, "measure", measure)
    code, out, err = invoke("--data", street, *TINY, "--batch", 4, "--json")
    assert code == 0, err
    document = json.loads(out)
    assert document["largest_batch"] == 7
    assert [(row["batch"], row["fits"]) for row in document["batches"]][-2:] == [(4, True), (7, True)]


def test_a_gpu_without_room_for_one_image_is_an_error(street, tmp_path, monkeypatch):
    def measure(step, size, accumulate, batch):
        raise torch.OutOfMemoryError

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dry_run, "measure", measure)
    code, _, err = invoke("--data", street, *TINY)
    assert (code, err) == (1, "fastseg: --size: the GPU has no room for one image of 32x48; use a smaller one\n")


def test_it_is_for_a_run_that_has_not_begun(tmp_path):
    assert invoke("--data", "synth", *TINY, "--resume", "--run", tmp_path)[0] == 2
