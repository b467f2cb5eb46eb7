"""A profile's summary as text for a terminal."""

from typing import Any

from fastseg.runlog import percent


def show(document: dict[str, Any]) -> str:
    """All ranks, one after the other."""
    return "\n".join(line for rank in document["ranks"] for line in _rank(rank))


def _rank(found: dict[str, Any]) -> list[str]:
    lines = [f"rank {found['rank']}: {found['steps']} steps, median {found['step_ms']:.1f} ms; per step:"]
    lines += _table("range of the step (host)", found["ranges"])
    if found["operators"]:
        lines += _table("operators, without what they call", found["operators"])
    device = found["device"]
    if device:
        lines.append(f"GPU busy {percent(device['busy'])} of the time")
        lines += _table("GPU time by range", device["ranges"])
        lines += _table("GPU idle while the host was in", device["idle"])
        lines += _table("kernels", device["kernels"])
        lines.append(f"Tensor Cores: {percent(device['tensor_core_share'])} of the time of computing kernels")
        talk, copies = device["communication"], device["copies_to_device"]
        if talk:
            lines.append(f"NCCL: {talk['ms']:.2f} ms per step, {percent(talk['hidden'])} of it beside computation")
        lines.append(
            f"copies to the device: {copies['calls']:.1f} per step, {copies['megabytes']:.1f} MB, {copies['ms']:.2f} ms"
        )
        conversions = sum(row["calls"] for row in device["layout_conversions"])
        where = ", ".join(f"{row['name']} {row['calls']:g}" for row in device["layout_conversions"])
        lines.append(f"layout conversion kernels: {conversions:g} per step{f' ({where})' if where else ''}")
    changes = found["layout_changes"]
    lines.append(f"changes of memory layout in a step: {sum(row['calls'] for row in changes)}")
    lines += [f"  {r['change']}  {r['operator']} in {r['where']}, {r['calls']} times" for r in changes]
    return lines


def _table(title: str, rows: list[dict[str, Any]], indent: str = "  ") -> list[str]:
    lines = [f"{title}:"] if title else []
    for row in rows:
        calls = f"  {row['calls']:g} calls" if "calls" in row else ""
        lines.append(
            f"{indent}{row['name'][:60]:<{42 - len(indent)}} {row['ms']:>9.2f} ms {percent(row['share']):>8}{calls}"
        )
        lines += _table("", row.get("ranges", []), f"{indent}  ")
    return lines
