"""The record of a run, log.jsonl, and the views of it that are written as it grows: TensorBoard and the terminal."""

import datetime
import json
import logging
import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from fastseg import config as configs
from fastseg.errors import FastsegError
from fastseg.runs import read_log
from fastseg.texts import pasted, shown

SCALARS = {
    "train": (
        "loss",
        "lr",
        "img_per_s",
        "img_per_s_per_device",
        "data_wait",
        "decoded_per_s",
        "memory_mib",
        "loss_scale",
    ),
    "val": ("miou", "global_accuracy", "mean_accuracy", "fw_iou"),
}
WIDE = 100  # columns of a terminal that has room for a bar beside the figures


def now() -> str:
    """The local time, to the second, with its offset."""
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")


def duration(seconds: float) -> str:
    """ "1:02:03", or "2:03" below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def counted(number: int, what: str) -> str:
    """ "1 step", "2 steps"."""
    return f"{number} {what}{'s' * (number != 1)}"


def percent(value: float | None) -> str:
    """A share as "12.3 %", or a dash where it is undefined."""
    return "-" if value is None else f"{100 * value:.1f} %"


def plain(text: str) -> Text:
    """A user's text for rich, to which brackets in a text of its own mean markup, and colons emoji."""
    return Text(shown(text))


class Appended:
    """A file that grows by whole lines or records, each handed to the system at once.

    No buffer, so that a full disk says so where a line is written, and not again when the file is closed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = path.open("ab", buffering=0)

    def write(self, data: bytes) -> None:
        """Append `data`.

        Raises:
            FastsegError: the disk is full, or fails.
        """
        try:
            while data:  # the system may take a part, and say only then why not more
                data = data[self.file.write(data) :]
        except OSError as error:
            raise FastsegError(
                f"{self.path} could not be written ({error.strerror}); the run's last checkpoint is kept: "
                f"mend that, then go on with fastseg train --resume --run {pasted(self.path.parent)}"
            ) from None

    def close(self) -> None:
        self.file.close()


class Board:
    """TensorBoard's file of one run.

    torch's SummaryWriter writes from a thread, which dies of a full disk with a traceback, and opens the file anew for
    each record.

    Args:
        run: the run folder.
        start: the first step that will be written; TensorBoard drops what it has from there on.
    """

    def __init__(self, run: Path, start: int) -> None:
        from tensorboard.compat.proto import event_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter
        from torch.utils.tensorboard import summary

        self.protos, self.make = event_pb2, summary
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        self.records = RecordWriter(Appended(run / name))
        self._write(start, file_version="brain.Event:2")
        self._write(start, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))

    def _write(self, step: int, **content: Any) -> None:
        self.records.write(self.protos.Event(wall_time=time.time(), step=step, **content).SerializeToString())

    def scalar(self, tag: str, value: float, step: int) -> None:
        """A point of a curve."""
        self._write(step, summary=self.make.scalar(tag, value))

    def image(self, tag: str, pixels_HW3: np.ndarray, step: int) -> None:
        """A picture, uint8[H, W, 3]."""
        self._write(step, summary=self.make.image(tag, pixels_HW3, dataformats="HWC"))

    def hyper_parameters(self, values: dict[str, Any], metrics: dict[str, float]) -> None:
        """A row of TensorBoard's table of runs."""
        for summary in self.make.hparams(values, metrics):
            self._write(0, summary=summary)

    def close(self) -> None:
        self.records.close()


class RunLog:
    """Writes events of one run; only the main process has one that does anything.

    Args:
        run: the run folder.
        start: the first step that will be logged; TensorBoard drops what it has from there on.
        active: False makes every method do nothing.
    """

    def __init__(self, run: Path, start: int, *, active: bool) -> None:
        self.active, self.run = active, run
        if not active:
            return
        # TensorBoard's writer looks for TensorFlow and says so; nobody here needs to know.
        logging.getLogger("tensorboard").setLevel(logging.ERROR)
        self.file = Appended(run / "log.jsonl")
        self.board = Board(run, start + 1)
        self.console = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)
        self.progress: Progress | None = None

    def event(self, kind: str, step: int, **fields: Any) -> None:
        """Append one line, and its numbers to TensorBoard.

        Raises:
            FastsegError: the disk is full, or fails; so do all methods that write one.
        """
        if not self.active:
            return
        self.file.write(json.dumps({"event": kind, "step": step, **fields}, allow_nan=False).encode() + b"\n")
        for name in SCALARS.get(kind, ()):
            if fields.get(name) is not None:
                self.board.scalar(f"{kind}/{name}", fields[name], step)

    def say(self, text: str) -> None:
        """One line on the terminal, above the progress bar."""
        if self.active:
            self.console.print(text, markup=False)

    def start(self, step: int, facts: dict[str, str], **fields: Any) -> None:
        """The start block: one line per fact, always the same ones in the same order."""
        self.event("start", step, time=now(), **fields)
        for name, value in facts.items():
            self.say(f"{name:<10} {value}")
        if self.active and self.console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                *([BarColumn()] if self.console.width >= WIDE else []),
                MofNCompleteColumn(),
                TextColumn("{task.fields[now]}"),
            )
            self.progress = Progress(*columns, console=self.console, transient=True)
            self.progress.start()
            self.task = self.progress.add_task("step", total=fields["total_steps"], completed=step, now="")

    def train(self, step: int, *, total: int, epochs: int, left: float, **fields: Any) -> None:
        """A log interval: a line, or the progress bar's text on a terminal. `left` is the time left in seconds."""
        self.event("train", step, **fields)
        if not self.active:
            return
        parts = [
            f"epoch {fields['epoch']:.2f}/{epochs}",
            f"step {step}/{total}",
            "loss -" if fields["loss"] is None else f"loss {fields['loss']:.4f}",
            f"lr {fields['lr']:.2e}",
            f"{fields['img_per_s']:.1f} img/s ({fields['img_per_s_per_device']:.1f} per device)",
            f"data wait {percent(fields['data_wait'])}",
            *([f"decoding {fields['decoded_per_s']:.1f} img/s"] if fields["decoded_per_s"] else []),
            f"{fields['memory_mib']:.0f} MiB",
            *([f"loss scale {fields['loss_scale']:.0f}"] if fields["loss_scale"] is not None else []),
            *([f"{counted(fields['void_steps'], 'step')} all void"] if fields["void_steps"] else []),
            *([f"{counted(fields['skipped_steps'], 'step')} skipped"] if fields["skipped_steps"] else []),
            f"{duration(left)} left",
        ]
        if self.progress:
            self.progress.update(self.task, completed=step, now="  ".join([parts[0], *parts[2:]]))
        else:
            self.say("  ".join(parts))

    def val(self, step: int, *, epochs: int, **fields: Any) -> None:
        """A validation: always a line of its own."""
        self.event("val", step, **fields)
        best = "  best so far" if fields["best"] else ""
        if self.active and fields["best"]:
            for path in sorted((self.run / "overlays").glob("*.png")):
                # By place and kind: the images may be others each time.
                tag = "val/" + "-".join(path.stem.split("-")[:2])
                self.board.image(tag, np.asarray(Image.open(path)), step)
        figures = f"mIoU {percent(fields['miou'])}  global accuracy {percent(fields['global_accuracy'])}"
        self.say(f"epoch {fields['epoch']:g}/{epochs}  validation  {figures}  {fields['seconds']:.1f} s{best}")

    def end(self, step: int, **fields: Any) -> None:
        """The last line, TensorBoard's hyper-parameters, and the table per class of the best validation."""
        self.event("end", step, time=now(), **fields)
        if not self.active:
            return
        self.hyper_parameters(fields["best_miou"])
        self.close()
        best = [event for event in read_log(self.run) if event["event"] == "val" and event["best"]]
        if best:
            self.console.print(class_table(best[-1], f"best validation, epoch {best[-1]['epoch']:g}"))

    def hyper_parameters(self, miou: float | None) -> None:
        """The configuration and what came of it, for TensorBoard's table of runs."""
        tree = configs.read(self.run / "config.toml").as_dict()
        flat = {f"{section}.{key}": value for section, part in tree.items() for key, value in part.items()}
        self.board.hyper_parameters(flat, {"val/miou": miou or 0.0})

    def close(self) -> None:
        """Stop the progress bar and close the files."""
        if not self.active:
            return
        if self.progress:
            self.progress.stop()
        self.file.close()
        self.board.close()


class Figures:
    """A table of names and figures, of which none is ever cut: names are folded for them; where that is not enough,
    the terminal is so narrow that the rows stand one below another.

    Args:
        heads: of the columns; the first one's is of the names.
        rows: a name and its figures.
        foot: a row of the same below all others; empty for none.
    """

    LEAST = 8  # characters of a name's line

    def __init__(self, title: str, heads: Sequence[str], rows: Sequence[Sequence[str]], foot: Sequence[str] = ()):
        self.title, self.heads, self.foot = plain(title), heads, foot
        self.rows = [(shown(name), *figures) for name, *figures in rows]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        rows = [*self.rows, *([self.foot] if self.foot else [])]
        for heads in (self.heads, [max(head.split(), key=len) for head in self.heads]):  # in a line, or in several
            widths = [max(map(cell_len, column)) for column in zip(heads, *rows, strict=True)]
            room = options.max_width - sum(widths[1:]) - 3 * len(widths) - 1
            # A name is folded only where no shorter head makes room for all of it.
            if room >= (widths[0] if heads is self.heads else min(widths[0], self.LEAST)):
                yield self._table([min(widths[0], room), *widths[1:]])
                return
        if self.title:
            yield self.title
        for name, *figures in rows:
            yield Text(name)
            told: list[str] = []
            for head, figure in zip(self.heads[1:], figures, strict=True):
                both = f" {head} {figure}"
                told += (
                    ([both] if cell_len(both) <= options.max_width else [f" {head}", f" {figure}"]) if figure else []
                )
            line = ""
            for part in told:
                if line and cell_len(line + part) > options.max_width:
                    yield Text(line)
                    line = ""
                line += part
            yield Text(line)

    def _table(self, widths: Sequence[int]) -> Table:
        table = Table(title=self.title or None, title_justify="left", show_footer=bool(self.foot))
        for number, (head, foot) in enumerate(zip(self.heads, self.foot or [""] * len(widths), strict=True)):
            justify: Literal["left", "right"] = "right" if number else "left"
            table.add_column(head, foot, justify=justify, overflow="fold", width=widths[number])
        for name, *figures in self.rows:
            table.add_row(Text(name), *figures)
        return table


def class_table(scores: dict, title: str) -> Group:
    """A table per class of a scores document (`Scores.summary`), its means and what to compare them with below."""
    shares = {"iou": "IoU", "accuracy": "accuracy", "precision": "precision", "dice": "Dice"}
    means = {"iou": scores["miou"], "accuracy": scores["mean_accuracy"]}
    if "boundary_f1" in scores:
        shares["boundary_f1"], means["boundary_f1"] = "boundary F1", scores["boundary_f1"]
    table = Figures(
        title,
        ["class", *shares.values(), "pixels"],
        [[row["name"], *(percent(row[key]) for key in shares), f"{row['pixels']:,}"] for row in scores["classes"]],
        [
            "mean",
            *(percent(means[key]) if key in means else "" for key in shares),
            f"{sum(row['pixels'] for row in scores['classes']):,}",
        ],
    )
    labelled = [row["pixels"] for row in scores["classes"]]
    constant = max(labelled) / max(1, sum(labelled)) / (len(labelled) - len(scores["absent"]) or 1)
    notes = [
        f"global accuracy {percent(scores['global_accuracy'])}, frequency-weighted IoU {percent(scores['fw_iou'])}",
        f"for comparison: the commonest class everywhere gives mIoU {percent(constant)}",
    ]
    if scores["absent"]:
        notes.append(f"in neither labels nor predictions, left out of means: {', '.join(scores['absent'])}")
    return Group(table, *(Text(note) for note in notes))


def comparison_table(document: dict, a: str, b: str) -> Group:
    """What checkpoint `b` changed against `a`, per class and over all images (`evaluation.evaluate_against`)."""
    classes = zip(document["a"]["classes"], document["b"]["classes"], document["classes"], strict=True)
    rows = [[x["name"], percent(x["iou"]), percent(y["iou"]), points(row["difference"])] for x, y, row in classes]
    found = document["comparison"]
    spread = found["difference"]
    return Group(
        Figures(f"{b} against {a}", ("class", "IoU before", "IoU now", "difference"), rows),
        Text(f"mIoU {percent(document['a']['miou'])} before, {percent(document['b']['miou'])} now"),
        Text(
            f"difference {points(spread['value'])}, 95 % interval {points(spread['low'])} to {points(spread['high'])}, "
            f"p = {found['chance']:.3f}; {found['better']} images better, {found['worse']} worse"
        ),
    )


def points(value: float | None) -> str:
    """A difference of shares in percentage points, with its sign."""
    return "-" if value is None else f"{100 * value:+.1f} pp"
