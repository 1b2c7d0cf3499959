"""The picture of the contrast benchmark, from its rows: seconds and memory over the pixels."""

import csv
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# in the order of the legend: colour and marker
STYLES = {
    "naive": ("#4d4d4d", "s"),
    "compiled naive": ("#a6761d", "D"),
    "pytorch-metric-learning": ("#d95f02", "v"),
    "ours": ("#1f5fa8", "o"),
    "ours fp16": ("#1f5fa8", "o"),
    "ours bf16": ("#1b9e77", "^"),
    "ours tf32": ("#7b4ea3", "P"),
    "ours fp32": ("#66a61e", "X"),
    "ours deterministic": ("#e7298a", "d"),
}
SMALLEST_MB = 1.0  # less is noise of the resident memory, and zero has no place on a log axis
Row = Mapping[str, str]
Curves = dict[str, dict[int, Row]]  # implementation -> N -> the latest row


def read_panels(
    path: Path, device_type: str, features: Sequence[int] | None
) -> dict[tuple[str, int], Curves]:
    """The latest rows of pass "both", by device and D; features None: all.

    Raises FileNotFoundError, or ValueError for a file without such rows.
    """
    panels: dict[tuple[str, int], Curves] = defaultdict(lambda: defaultdict(dict))
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            is_wanted = not features or int(row["D"]) in features
            is_cpu = row["device"].startswith("CPU")
            if row["pass"] == "both" and is_cpu == (device_type == "cpu") and is_wanted:
                curves = panels[row["device"], int(row["D"])]
                curves[row["implementation"]][int(row["N"])] = row
    if not panels:
        raise ValueError(f"{path} has no rows of pass both, --device {device_type} and --features")
    return dict(sorted(panels.items()))


def lowest_floor(curves: Curves) -> tuple[dict[int, float], str]:
    """Seconds of the lowest floor of each N, and the precision that the last belongs to."""
    floors: dict[int, tuple[float, str]] = {}
    for curve in curves.values():
        for size, row in curve.items():
            if row["times_floor"]:
                floor = float(row["seconds"]) / float(row["times_floor"]), row["precision"]
                floors[size] = min(floors.get(size, floor), floor)
    sizes = sorted(floors)
    return {size: floors[size][0] for size in sizes}, floors[sizes[-1]][1] if sizes else ""


def draw_panels(panels: Mapping[tuple[str, int], Curves], path: Path) -> None:
    """Write a PNG: per panel, seconds and peak extra memory over N, both axes logarithmic."""
    # measuring needs no matplotlib
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1)  # inches
    figure = Figure(figsize=(11, 5 * len(panels)), layout=layout)
    parts = figure.subfigures(len(panels), 1, squeeze=False)[:, 0]
    for ((device, num_features), curves), part in zip(panels.items(), parts, strict=True):
        time_axes, memory_axes = part.subplots(1, 2)
        note = _draw(curves, "peak_extra_mb", memory_axes, SMALLEST_MB)
        _draw(curves, "seconds", time_axes, 0.0)
        floor, precision = lowest_floor(curves)
        if floor:
            line = {"color": "black", "lw": 1.2, "label": f"floor, {precision}"}
            time_axes.plot(list(floor), list(floor.values()), "--", **line)
        time_axes.set_ylabel("seconds")
        memory_axes.set_ylabel(f"peak extra memory in MB{note}")
        part.suptitle(f"{device}, D = {num_features}, forward and backward", fontsize=12)
        handles, labels = time_axes.get_legend_handles_labels()
        columns = len(labels) if len(labels) <= 5 else math.ceil(len(labels) / 2)
        part.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _draw(curves: Curves, column: str, axes: "Axes", smallest: float) -> str:
    """Draw each curve; the return value says where values below `smallest` are drawn."""
    sizes = sorted({size for curve in curves.values() for size in curve})
    lowest = math.inf
    for name in sorted(curves, key=list(STYLES).index):
        values = {size: float(curves[name][size][column]) for size in sorted(curves[name])}
        values = {size: value for size, value in values.items() if not math.isnan(value)}
        colour, marker = STYLES[name]
        style: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 5.5, "lw": 1.6}
        shown = [max(smallest, value) for value in values.values()]
        axes.plot(list(values), shown, label=name, **style)
        lowest = min([lowest, *values.values()])
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    names = [f"{size // 1024}k" if size % 1024 == 0 else str(size) for size in sizes]
    axes.set_xticks(sizes, names)
    axes.set_xticks([], minor=True)
    axes.set_xlabel("pixels N")
    axes.grid(alpha=0.3)
    return f" (below {smallest:g} drawn at {smallest:g})" if lowest < smallest else ""
