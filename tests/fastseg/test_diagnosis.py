"""`fastseg doctor`: what it says of made-up runs and documents, worked by hand."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from fastseg import diagnosis
from fastseg.cli import main
from fastseg.errors import FastsegError, UsageError

START = {"event": "start", "step": 0, "device": "CPU", "dtype": "bfloat16", "kernels": "torch", "world": 1}
START |= {
    "choices": {"loader": {"facts": {"threads": 9, "keeps": False, "obstacle": None}}},
}


def run(
    folder: Path, *, start: dict | None = None, waits=(0.9, 0.9, 0.5, 0.5), epochs=None, machine=None, val=0.0
) -> Path:
    """A run whose log lines have these shares of waiting, a second and 10 images each."""
    lines = [START | (start or {})]
    for n, wait in enumerate(waits):
        epoch = epochs[n] if epochs else 2.0
        lines.append(
            {"event": "train", "step": n, "epoch": epoch, "img_per_s": 10.0, "data_wait": wait, "decoded_per_s": 4.0,
             "memory_mib": 2048.0, "seconds": n + 1.0}
        )  # fmt: skip
    lines.append({"event": "val", "step": len(waits), "seconds": val})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "environment.json").write_text(json.dumps({"cores": 16} | (machine or {})))
    return folder


def test_a_run_that_waits_for_data_it_does_not_keep(tmp_path):
    (finding,) = diagnosis.of_run(run(tmp_path / "r"))
    # The first two lines do not count: half of the time is waiting, so at most twice as fast.
    said = "training waits 50.0 % of the time for data; decoding uses 9 of 16 threads for 4 img/s"
    said += "; nothing is kept, as asked"
    assert finding == (said, 2.0, "--loader auto")


def test_what_does_not_fit_is_named_with_the_cure(tmp_path):
    choice = {"facts": {"threads": 2, "keeps": False, "obstacle": "60 GB are needed and 40 free"}}
    (finding,) = diagnosis.of_run(run(tmp_path / "r", start={"choices": {"loader": choice}}))
    assert "nothing is kept, since 60 GB are needed and 40 free" in finding.text
    assert "--cache-dir" in finding.cure


def test_a_cache_that_is_being_filled_is_told_from_one_that_is_too_slow(tmp_path):
    start = {"choices": {"loader": {"facts": {"threads": 2, "keeps": True, "obstacle": None}}}}
    waits, epochs = (0.9, 0.9, 0.8, 0.02, 0.02), (0.2, 0.4, 0.9, 1.5, 2.0)
    (filling,) = diagnosis.of_run(run(tmp_path / "a", start=start, waits=waits, epochs=epochs))
    assert "only the first epoch does, which fills the cache" in filling.text
    assert filling.expected == pytest.approx(1 / (1 - 0.28))
    (slow,) = diagnosis.of_run(run(tmp_path / "b", start=start))
    assert "although the data are cached" in slow.text


def test_a_run_that_the_network_binds(tmp_path):
    (finding,) = diagnosis.of_run(run(tmp_path / "r", waits=(0.5, 0.5, 0.01, 0.01)))
    assert finding.text == (
        "training waits 1.0 % of the time for data: a faster data path could give 1.010 times the speed at most"
    )


def test_precision_operators_memory_and_validation(tmp_path):
    capture = {"value": "off", "why": "as asked, the host asks for each kernel"}
    choices = START["choices"] | {"capture": capture}
    start = {"device": "NVIDIA H100 80GB HBM3", "dtype": "float32", "choices": choices}
    machine = {"gpu_memory": "81559 MiB, 81559 MiB"}
    folder = run(tmp_path / "r", start=start, waits=(0, 0, 0, 0), machine=machine, val=4.0)
    _, dtype, kernels, memory, eager, validation = diagnosis.of_run(folder)
    assert dtype.cure == "--amp"
    assert kernels.cure == "--set runtime.kernels=auto"
    assert memory.text == "2.0 of 79.6 GiB of the GPU are used: a larger batch fits"
    assert eager.text.startswith("the host asks for each kernel of a step (as asked, the host asks for each kernel), ")
    # 4 s of validation beside 4 of training; a fifth of them would leave 4.8 s of 8.
    assert validation.text == "50.0 % of the run is validation"
    assert validation.expected == pytest.approx(8 / 4.8)


def test_a_captured_run_says_what_that_took_and_one_that_failed_why(tmp_path):
    choices = START["choices"] | {"capture": {"value": "on", "why": "passes are replayed"}}
    start = {"device": "NVIDIA H100 80GB HBM3", "choices": choices}
    folder = run(tmp_path / "r", start=start, waits=(0, 0, 0, 0))
    with (folder / "log.jsonl").open("a") as log:
        for seconds, mib in ((1.25, 300.0), (2.0, 512.0)):
            log.write(json.dumps({"event": "captured", "step": 3, "seconds": seconds, "memory_mib": mib}) + "\n")
    found = [finding.text for finding in diagnosis.of_run(folder)]
    assert "steps are replayed from CUDA graphs: 2 captured in 3.2 s, of which the last holds 512 MiB" in found
    with (folder / "log.jsonl").open("a") as log:
        log.write(json.dumps({"event": "not_captured", "step": 3, "why": "out of memory"}) + "\n")
    (failed,) = [f for f in diagnosis.of_run(folder) if "the host asks for each kernel" in f.text]
    assert "(out of memory)" in failed.text
    assert "runtime.capture=auto" in failed.cure


def test_no_run_and_a_run_that_has_hardly_begun_are_errors(tmp_path):
    with pytest.raises(UsageError, match="no run there"):
        diagnosis.of_run(tmp_path)
    with pytest.raises(FastsegError, match="too short"):
        diagnosis.of_run(run(tmp_path / "r", waits=(0.5, 0.5)))


def document(**rows: dict[str, float]) -> dict:
    return {kind: [{"name": name, "value": value} for name, value in values.items()] for kind, values in rows.items()}


def test_a_ladder_says_which_side_binds():
    rows = {"ladder together 8x8": 90.0, "ladder data wait 8x8": 31.0, "ladder lowest: + augment": 100.0}
    ratios = {"a faster data path: at most": 1.4, "a faster network: at most": 1.1}
    first, second = diagnosis.of_bench(document(results=rows, ratios=ratios))
    assert first.text == "90.0 img/s together; training waits 31.0 % of the time for data"
    assert second.text == "the data path binds (+ augment): a faster one could give 1.40 times the speed at most"
    assert second.expected == 1.4
    del rows["ladder lowest: + augment"]
    ratios |= {"a faster data path: at most": 1.01, "a faster network: at most": 12.0}
    _, second = diagnosis.of_bench(document(results=rows | {"ladder lowest: + optimiser": 9.0}, ratios=ratios))
    assert second.text.startswith("the network binds: a faster data path could give 1.01 times")


def test_a_model_says_what_precision_gives_and_how_far_the_roofline_is():
    rows = {"train step bfloat16 8x8 batch 2, share of the roofline": 40.0}
    precision, roof = diagnosis.of_bench(document(results=rows, ratios={"train step bfloat16 / float32": 1.9}))
    assert precision == ("bfloat16 trains 1.90 times as fast as float32", 1.9, "--amp")
    assert (roof.text, roof.expected) == ("train step bfloat16 8x8 batch 2: 40 % of what its roofline allows", 2.5)
    with pytest.raises(UsageError, match="no ladder and no model"):
        diagnosis.of_bench(document(results={"data cache": 1.0}, ratios={}))


def test_the_command_speaks_and_writes_json(tmp_path):
    folder = run(tmp_path / "r")
    spoken = CliRunner().invoke(main, ["doctor", "--run", str(folder)])
    assert spoken.exit_code == 0
    assert spoken.stdout.splitlines()[1] == "    expected: at most x2.00: --loader auto"
    found = json.loads(CliRunner().invoke(main, ["doctor", "--run", str(folder), "--json"]).stdout)["findings"]
    assert [sorted(finding) for finding in found] == [["cure", "expected", "text"]]
    wrong = CliRunner().invoke(main, ["doctor", "--run", str(folder), "--bench", str(folder)])
    assert (wrong.exit_code, wrong.stderr) == (2, "fastseg: doctor: give --run RUN or --bench FILE\n")
    records = sorted((Path(__file__).parents[2] / "bench" / "records").glob("*-cpu-all.json"))
    assert CliRunner().invoke(main, ["doctor", "--bench", str(records[-1])]).exit_code == 0
