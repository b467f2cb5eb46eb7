"""Several processes, over gloo on the CPU: the same run as one, on however many machines, whatever befalls them."""

import contextlib
import hashlib
import json
import os
import pty
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from fastseg import config as configs
from fastseg import runs
from fastseg.checkpoint import read
from fastseg.cli import main
from fastseg.data.synth import write
from fastseg.evaluation import evaluate
from fastseg.training import train

pytestmark = pytest.mark.slow

# More random moments than CI has time for: FASTSEG_MOMENTS=10 pytest tests/fastseg/test_processes.py
MOMENTS = range(int(os.environ.get("FASTSEG_MOMENTS", "1")))
WORKER = Path(__file__).parent / "worker.py"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

# 8 images in batches of 2 x 2: epochs of 2 steps.
TINY = {"data.size": "32x48", "model.depth": 1, "train.batch": 2, "train.epochs": 8, "train.ema": 0.9}
TINY |= {"train.validate_every": 4, "train.checkpoint_steps": 3, "runtime.log_every": 2, "runtime.device": "cpu"}
TINY |= {"train.grow_from": 1.0, "runtime.threads": 1}  # sums of other parts are rounded otherwise
TINY |= {"runtime.loader": "reference"}  # to import DALI takes each process seconds; worker.py does


def sets(**changes: object) -> list[str]:
    """TINY with changes as --set options; keys are written section__field."""
    named = TINY | {key.replace("__", "."): value for key, value in changes.items()}
    return [part for key, value in named.items() for part in ("--set", f"{key}={value}")]


def as_from_a_terminal() -> None:
    """What these tests were started by may ignore signals: nohup, or a shell with its & (as the Makefile has it)."""
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


def fastseg(*words: object, launcher: tuple[str, ...] = (), **options) -> subprocess.Popen:
    """A running fastseg command, by `launcher` where one is given."""
    command = [*(launcher or (sys.executable, "-m")), "fastseg", *map(str, words)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": ENVIRONMENT}
    pipes["preexec_fn"] = as_from_a_terminal
    return subprocess.Popen(command, **(pipes | options))


def end(process: subprocess.Popen, timeout: float = 120) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command that ends within `timeout` seconds."""
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return process.returncode, out, err


def torchrun(processes: int) -> tuple[str, ...]:
    # Without the -- torchrun takes our --run for a short form of its --run-path.
    return (sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m", "--")


def workers(launcher: int) -> list[int]:
    """Process ids of a launcher's workers."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    return [int(pid) for pid in children if b"fastseg" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def events(run: Path, kind: str) -> list[dict]:
    return [event for event in runs.read_log(run) if event["event"] == kind]


def same_bits(a: Path, b: Path) -> bool:
    """True where two runs' last checkpoints hold equal weights, momentum and averages."""
    old, new = (read(run / "checkpoints" / "last.pt") for run in (a, b))
    momenta = [{k: v["momentum_buffer"] for k, v in s["optimizer"]["state"]["state"].items()} for s in (old, new)]
    pairs = [(old["model"], new["model"]), (old["ema"], new["ema"]), momenta]
    return old["progress"]["step"] == new["progress"]["step"] and all(
        torch.equal(x[key], y[key]) for x, y in pairs for key in x | y
    )


def losses(run: Path) -> list[tuple[int, float]]:
    return [(event["step"], event["loss"]) for event in events(run, "train")]


@pytest.fixture(scope="module")
def undisturbed(street, tmp_path_factory) -> Path:
    """A run of two processes from beginning to end: 16 steps."""
    run = tmp_path_factory.mktemp("processes") / "undisturbed"
    command = ["train", "--data", street, "--recipe", "fast", *sets(), "--nproc", 2, "--run", run]
    code, _, err = end(fastseg(*command, "--device", "cpu"))
    assert code == 0, err
    assert "Grad strides do not match" not in err  # channels-last gradients fit DDP's buckets
    return run


def test_a_run_says_what_its_gradients_weigh(undisturbed):
    weights = read(undisturbed / "checkpoints" / "last.pt")["model"]
    learnt = [value for key, value in weights.items() if not re.search(r"running_|num_batches", key)]
    nbytes = sum(4 * value.numel() for value in learnt)
    (start,) = events(undisturbed, "start")
    assert (start["world"], start["gradient_bytes"]) == (2, nbytes)
    (buckets,) = events(undisturbed, "buckets")
    assert (buckets["step"], sum(buckets["bucket_bytes"])) == (2, nbytes)
    times = buckets["ready_ms"]
    assert len(times) == len(buckets["bucket_bytes"])
    assert times == sorted(times)
    assert times[0] > 0


def test_checkpoints_inside_epochs_come_a_step_after_they_are_due(undisturbed):
    # Every 3 steps of 16; the processes hear of one another's wishes a step later, so that nobody waits.
    assert [event["step"] for event in events(undisturbed, "checkpoint")] == [4, 7, 10, 13]


@pytest.mark.parametrize("moment", MOMENTS)
def test_kill_9_of_a_worker_restarts_all_and_ends_with_the_same_bits(street, tmp_path, undisturbed, moment):
    draw = random.Random(f"kill {moment}")
    run = tmp_path / "run"
    command = ["train", "--data", street, "--recipe", "fast", *sets(), "--device", "cpu", "--nproc", 2, "--run", run]
    process = fastseg(*command)
    while len(workers(process.pid)) < 2:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    # Every third one dies as it starts, the others at a step.
    step = draw.randrange(0, 14) if moment % 3 else -1
    while (latest := max((event["step"] for event in runs.read_log(run)), default=-1)) < step:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    time.sleep(draw.random() * (0.1 if latest >= 0 else 5))
    os.kill(draw.choice(workers(process.pid)), signal.SIGKILL)
    code, _, err = end(process)
    assert code == 0, err
    assert same_bits(undisturbed, run)
    assert losses(run) == losses(undisturbed)
    assert err.count("all processes start again, from the last checkpoint (restart 1)") == 1


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_signal_saves_and_resume_ends_with_the_same_bits(street, tmp_path, undisturbed, moment):
    draw = random.Random(f"signal {moment}")
    number = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1][moment % 3]
    run = tmp_path / "run"
    command = ["train", "--data", street, "--recipe", "fast", *sets(), "--device", "cpu", "--nproc", 2, "--run", run]
    process = fastseg(*command)
    step = draw.randrange(0, 14)
    while not any(event["step"] >= step for event in runs.read_log(run)):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    process.send_signal(number)
    code, _, err = end(process)
    assert code == 75, err
    (stopped,) = events(run, "stopped")
    (told,) = [line for line in err.splitlines() if line.startswith("fastseg: ")]
    told, _, cure = told.partition("; go on with: fastseg ")
    assert told == f"fastseg: {number.name}: saved after step {stopped['step']}"
    assert read(run / "checkpoints" / "last.pt")["progress"]["step"] == stopped["step"] >= step
    mine = os.sched_getaffinity(0)
    os.sched_setaffinity(0, range(os.cpu_count() or 1))  # as many as the run had, also where tests keep to a half
    process = fastseg(*cure.split())
    os.sched_setaffinity(0, mine)
    code, _, err = end(process)
    assert code == 0, err
    assert "resumes with 2 processes, as before" in err
    assert same_bits(undisturbed, run)
    assert losses(run) == losses(undisturbed)


def test_a_second_signal_ends_at_once_and_leaves_no_worker_behind(street, tmp_path):
    command = ["train", "--data", street, "--recipe", "fast", *sets(train__epochs=9999), "--device", "cpu"]
    process = fastseg(*command, "--nproc", 2, "--run", tmp_path / "run")
    while not events(tmp_path / "run", "train"):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    found = workers(process.pid)
    assert len(found) == 2
    for worker in found:
        os.kill(worker, signal.SIGSTOP)  # cannot finish its step
    process.send_signal(signal.SIGTERM)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    code, _, err = end(process, timeout=10)
    assert code == 128 + signal.SIGTERM
    assert err.splitlines()[-1] == "fastseg: SIGTERM: ended without saving; the last checkpoint counts, if there is one"
    time.sleep(0.5)
    assert not any(Path(f"/proc/{pid}").exists() and "Z" not in state(pid) for pid in found)


def state(pid: int) -> str:
    """A process's state, as /proc says it: Z for a zombie."""
    with contextlib.suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return "Z"


def test_two_launchers_as_two_machines_train_the_same_run(street, tmp_path, undisturbed):
    port = free_port()
    run = tmp_path / "run"
    command = ["train", "--data", street, "--recipe", "fast", *sets(), "--device", "cpu", "--run", run]
    nodes = [fastseg(*command, "--nnodes", 2, "--rdzv-endpoint", f"localhost:{port}") for _ in range(2)]
    ends = [end(node) for node in nodes]
    assert [code for code, _, _ in ends] == [0, 0], ends
    assert events(run, "start")[0]["world"] == 2
    assert same_bits(undisturbed, run)
    assert losses(run) == losses(undisturbed)
    scores = [[event["miou"] for event in events(other, "val")] for other in (run, undisturbed)]
    assert scores[0] == scores[1]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def test_slurm_tasks_find_one_another_and_train_the_same_run(street, tmp_path, undisturbed):
    run = tmp_path / "run"
    job = SLURM | {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_NODEID": "0"}
    command = ["train", "--data", street, "--recipe", "fast", *sets(), "--device", "cpu", "--run", run]
    tasks = [
        fastseg(*command, env=ENVIRONMENT | job | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)})
        for rank in range(2)
    ]
    ends = [end(task) for task in tasks]
    assert [code for code, _, _ in ends] == [0, 0], ends
    assert same_bits(undisturbed, run)


def test_torchrun_trains_the_same_run(street, tmp_path, undisturbed):
    run = tmp_path / "run"
    command = ["train", "--data", street, "--recipe", "fast", *sets(), "--device", "cpu", "--run", run]
    code, _, err = end(fastseg(*command, launcher=torchrun(2)))
    assert code == 0, err
    assert same_bits(undisturbed, run)


def test_a_run_goes_on_with_another_number_of_processes_and_says_so(tmp_path, undisturbed):
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    config, _ = runs.reopen(run, lambda old: configs.override(old, {"train.epochs": 10}))
    train(config, run, resume=True)
    first, second = events(run, "start")
    assert (first["world"], second["world"], first["batch"], second["batch"]) == (2, 1, 4, 4)


@pytest.mark.parametrize(
    ("recipe", "processes", "asked", "said"),
    [
        ("baseline", 1, [], "own: the data set brings it"),
        ("fast", 1, [], "own: the data set brings it"),
        ("fast", 2, [], "own: the data set brings it"),
        ("baseline", 1, ["--split-scheme", "random-60-40"], "random-60-40: as asked, in place of the data set's own; "),
    ],
)
def test_no_recipe_trains_on_the_data_sets_own_test_images(tmp_path, recipe, processes, asked, said):
    folder, run = tmp_path / "mine", tmp_path / "run"
    write(folder, counts={"train": 6, "val": 4, "test": 4}, size=(32, 48))
    held = {path.stem: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in (folder / "test").iterdir()}
    command = ["train", "--data", folder, "--recipe", recipe, *asked, *sets(train__epochs=1, train__validate_every=1)]
    command += ["--init", "none", "--batch", 1, "--device", "cpu", "--nproc", processes, "--run", run]
    if processes == 1:
        done = CliRunner().invoke(main, [*map(str, command)])
        code, err = done.exit_code, done.stderr
    else:
        code, _, err = end(fastseg(*command))
    assert code == 0, err
    assert f"\nsplit      {said}" in err
    recorded = json.loads((run / "split.json").read_text())
    trained = read(run / "checkpoints" / "last.pt")["trained_on"]
    assert (recorded["train"], recorded["train_contents"]) == (trained["stems"], trained["contents"])
    assert len(trained["stems"]) == 6
    assert not held.keys() & {*recorded["train"], *recorded["val"]}
    assert not set(held.values()) & set(trained["contents"])
    assert recorded["scheme"] == said.partition(":")[0]
    document = evaluate(run / "checkpoints" / "last.pt", split="test")
    assert [document["protocol"][key] for key in ("images", "trained_on")] == [4, 0]


SLURM = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "localhost"}


def test_slurms_one_task_per_node_starts_what_nproc_and_nnodes_ask_for(street, tmp_path):
    port, run = free_port(), tmp_path / "run"
    asked = ["--nproc", 2, "--nnodes", 2, "--rdzv-endpoint", f"localhost:{port}", "--run", run]
    command = ["train", "--data", street, "--recipe", "fast", *sets(train__batch=1, train__epochs=1), "--device", "cpu"]
    job = SLURM | {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_LOCALID": "0"}
    tasks = [
        fastseg(*command, *asked, env=ENVIRONMENT | job | {"SLURM_PROCID": str(node), "SLURM_NODEID": str(node)})
        for node in range(2)
    ]
    ends = [end(task) for task in tasks]
    assert [code for code, _, _ in ends] == [0, 0], ends
    assert [(event["world"], event["batch"]) for event in events(run, "start")] == [(4, 4)]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_processes_see_the_samples_and_losses_of_one(street, tmp_path, accumulate):
    # Batch norms use frozen statistics here, since each process's batch has its own.
    found = []
    for processes in (1, 2):
        script = [*torchrun(processes)[:-2], str(WORKER), "frozen", str(street), str(tmp_path / str(processes))]
        process = subprocess.Popen(
            [*script, str(accumulate)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
        )
        code, out, err = end(process)
        assert code == 0, err
        ranks = [said for said in map(json.loads, out.splitlines()) if "rank" in said]
        ranks.sort(key=lambda said: said["rank"])
        order = [[said["samples"][step] for said in ranks] for step in range(20)]
        # Rank r of w takes every w-th sample of a step.
        samples = [[s for group in zip(*parts, strict=True) for s in group] for parts in order]
        found.append((samples, [event["loss"] for event in events(tmp_path / str(processes), "train")]))
    (one, losses_of_one), (two, losses_of_two) = found
    assert one == two
    assert len(set(one[0] + one[1])) == 8
    assert len(losses_of_one) == 20
    assert losses_of_two == pytest.approx(losses_of_one, rel=1e-5)


@pytest.mark.parametrize("processes", [2, 3])
def test_each_image_is_scored_once_by_any_number_of_processes(street, undisturbed, processes):
    checkpoint = undisturbed / "checkpoints" / "last.pt"
    # 4 images: three processes cannot share them equally. They meet once, for both checkpoints.
    words = ("eval", checkpoint, "--against", checkpoint, "--json")
    code, out, err = end(fastseg(*words, launcher=torchrun(processes)))
    assert code == 0, err
    document = json.loads(out)
    assert document["a"] == document["b"]
    assert document["a"]["confusion"] == evaluate(checkpoint)["confusion"]
    assert document["comparison"]["difference"] == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_101_camvid_images_are_scored_once_by_one_process_and_by_two(camvid, undisturbed):
    words = ("eval", undisturbed / "checkpoints" / "last.pt", "--json", "--data", camvid, "--at", "network")
    done = CliRunner().invoke(main, [*map(str, words)])
    assert done.exit_code == 0, done.stderr
    code, out, err = end(fastseg(*words, launcher=torchrun(2)))
    assert code == 0, err
    found = [json.loads(said)["confusion"] for said in (done.stdout, out)]
    assert found[0] == found[1]
    assert sum(map(sum, found[0])) > 0.9 * 101 * 32 * 48


def test_a_late_process_is_named(street, tmp_path):
    script = [*torchrun(2)[:-2], str(WORKER), "late", str(street), str(tmp_path / "run")]
    process = subprocess.Popen(script, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    code, _, err = end(process, timeout=100)  # it sleeps 60 s; torchrun waits 30 s before it kills it
    assert code != 0
    said = [line for line in err.splitlines() if line.startswith("fastseg: ")]
    cure = "if it is only slow, set runtime.collective_timeout"
    assert said == [f"fastseg: rank 0: waited 10 s in vain for rank 1; {cure}"]


def test_the_error_of_one_process_ends_all_and_is_told_once(street, tmp_path):
    data = tmp_path / "street"
    subprocess.run(["cp", "-r", street, data], check=True)
    command = ["train", "--data", data, "--recipe", "fast", *sets(), "--device", "cpu", "--nproc", 2]
    broken = sorted((data / "train").iterdir())[3]
    broken.write_bytes(broken.read_bytes()[:-200])
    start = time.monotonic()
    code, _, err = end(fastseg(*command, "--run", tmp_path / "run"))
    said = [line for line in err.splitlines() if "fastseg: " in line]
    assert code == 1
    assert len(said) == 1, err
    assert re.match(rf"fastseg: rank \d: .*{broken.name}", said[0])
    assert time.monotonic() - start < 60


def test_a_bug_of_ours_shows_one_traceback(street, tmp_path):
    process = subprocess.Popen(
        [*torchrun(2)[:-2], str(WORKER), "bug", str(street), str(tmp_path / "run")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT,
    )  # fmt: skip
    code, _, err = end(process)
    assert code != 0
    assert len(re.findall(r"^ZeroDivisionError: a bug", err, re.MULTILINE)) == 2  # torchrun: one of each rank
    assert err.count("fastseg: rank 0: ZeroDivisionError: a bug") == 1
    assert err.count("fastseg: rank 1: ZeroDivisionError: a bug") == 1


@pytest.mark.parametrize(
    ("endpoint", "reason"),
    [("nowhere.invalid:29500", "nowhere.invalid"), ("localhost:1", "localhost:1"), ("localhost", "HOST:PORT")],
)
def test_machines_that_cannot_meet_say_where(street, tmp_path, endpoint, reason):
    command = ["train", "--data", street, "--recipe", "fast", *sets(runtime__collective_timeout=3), "--device", "cpu"]
    command += ["--run", tmp_path / "run", "--nnodes", 2, "--rdzv-endpoint", endpoint]
    code, _, err = end(fastseg(*command))
    assert code == 1, err
    (line,) = [line for line in err.splitlines() if line.startswith("fastseg: ")]
    assert line.startswith(f"fastseg: --rdzv-endpoint {endpoint}: 2 machines could not meet there (")
    assert "Traceback" not in err


def test_a_port_in_use_is_named(street, tmp_path):
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        taken.listen()
        port = taken.getsockname()[1]
        command = ["train", "--data", street, "--recipe", "fast", *sets(runtime__collective_timeout=3)]
        command += ["--device", "cpu", "--run", tmp_path / "run"]
        code, _, err = end(fastseg(*command, "--nnodes", 2, "--rdzv-endpoint", f"localhost:{port}"))
        assert code == 1
        assert f"fastseg: --rdzv-endpoint localhost:{port}: another program uses this port; give a free one" in err
        assert "Traceback" not in err
        rank = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        code, _, err = end(fastseg(*command, env=ENVIRONMENT | rank))
        assert code == 1
        assert f"fastseg: rank 0: 2 processes could not meet at localhost:{port}" in err
        assert "Traceback" not in err


def test_deterministic_runs_have_the_same_bits(street, tmp_path):
    for name in ("a", "b"):
        command = ["train", "--data", street, "--recipe", "fast", *sets(train__epochs=2, model__depth=2)]
        code, _, err = end(fastseg(*command, "--device", "cpu", "--deterministic", "--run", tmp_path / name))
        assert code == 0, err
    assert same_bits(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("processes", [1, 2])
def test_a_terminal_that_closes_saves(street, tmp_path, processes):
    run = tmp_path / "run"
    command = ["train", "--data", street, "--recipe", "fast", *sets(train__epochs=9999), "--device", "cpu"]
    command += ["--nproc", processes, "--run", run]
    pid, terminal = pty.fork()
    if pid == 0:
        as_from_a_terminal()
        os.execv(sys.executable, [sys.executable, "-m", "fastseg", *map(str, command)])
    while not events(run, "train"):
        with contextlib.suppress(BlockingIOError):
            os.set_blocking(terminal, False)
            os.read(terminal, 1 << 16)
        time.sleep(0.01)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 75
    (stopped,) = events(run, "stopped")
    assert stopped["signal"] == "SIGHUP"
    assert read(run / "checkpoints" / "last.pt")["progress"]["step"] == stopped["step"]


@pytest.mark.parametrize("processes", [1, 2])
def test_under_nohup_a_terminal_that_closes_is_nothing(street, tmp_path, processes):
    run = tmp_path / "run"
    command = ["train", "--data", street, "--recipe", "fast", *sets(train__epochs=9999), "--device", "cpu"]
    process = fastseg(*command, "--nproc", processes, "--run", run, launcher=("nohup", sys.executable, "-m"))
    while not events(run, "train"):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    before = events(run, "train")[-1]["step"]
    process.send_signal(signal.SIGHUP)
    while events(run, "train")[-1]["step"] < before + 3:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    code, _, err = end(process)
    assert code == 75, err
    assert events(run, "stopped")[0]["signal"] == "SIGTERM"


def test_ctrl_c_is_130_in_every_command(tmp_path):
    process = fastseg("data", "synth", tmp_path / "many", "--train", 99999)
    time.sleep(3)
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)  # of an impatient hand: the same
    code, _, err = end(process)
    assert (code, err.splitlines()) == (130, ["fastseg: interrupted"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_removes_what_is_unfinished_and_says_so(tmp_path, number):
    process = fastseg("data", "synth", tmp_path / "many", "--train", 99999)
    while not list(tmp_path.glob(".many.partial-*/train/*")):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    process.send_signal(number)
    code, _, err = end(process)
    assert (code, err.splitlines()) == (128 + number, [f"fastseg: {number.name}: ended"])
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_before_several_processes_train_is_told_in_one_line(street, tmp_path):
    command = ["train", "--data", street, "--recipe", "fast", *sets(), "--device", "cpu", "--nproc", 2]
    process = fastseg(*command, "--run", tmp_path / "run", start_new_session=True)
    while len(workers(process.pid)) < 2:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    time.sleep(2)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the launcher, and to its workers
    code, _, err = end(process)
    (says,) = (line for line in err.splitlines() if line.startswith("fastseg: "))
    assert code == 130
    assert re.match("fastseg: (interrupted|SIGINT: ended without saving)", says)


def test_a_profile_that_is_ended_names_no_folder_that_is_gone(street, tmp_path):
    command = ["profile", "--data", street, "--recipe", "fast", *sets(), "--device", "cpu", "--steps", 9999]
    process = fastseg(*command, cwd=tmp_path)
    while not [event for run in tmp_path.glob("runs/*/run") for event in events(run, "train")]:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    code, _, err = end(process)
    assert (code, err.splitlines()[-1]) == (130, "fastseg: interrupted")
    assert list((tmp_path / "runs").iterdir()) == []
