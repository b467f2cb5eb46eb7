"""docs/speedrun.md: each time and score of its table is that of the log beside it."""

import json
import shutil
from pathlib import Path

from fastseg.bench.accuracy import points, time_to

ROOT = Path(__file__).parents[2]


def test_each_record_has_the_times_and_the_score_of_its_log(tmp_path):
    page = (ROOT / "docs" / "speedrun.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:7]] for line in page.splitlines() if line.startswith("| `")]
    logs = {path.name for path in (ROOT / "bench" / "records").glob("*-fast-*-epochs-*.jsonl")}
    assert {name.strip("`") for name, *_ in rows} == logs
    for name, card, *told, last in rows:
        shutil.copy(ROOT / "bench" / "records" / name.strip("`"), tmp_path / "log.jsonl")
        start = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])
        assert (start["device"], start["split"]["train"] if "split" in start else 367) == (card, 367)
        curve = points(tmp_path)
        times = [time_to(curve, target) for target in (0.5, 0.6, 0.7)]
        assert told == ["" if t is None else f"{t:.1f} s" for t in times]
        assert last == f"{curve[-1].miou:.1%}".replace("%", " %")
