"""The rows of the contrast benchmark: appended to a CSV file, read from it, and drawn."""

import csv
import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {
    "naive": "#4d4d4d",
    "compiled naive": "#a6761d",
    "pytorch-metric-learning": "#d95f02",
    "ours": "#1f5fa8",
    "ours fp16": "#1f5fa8",
    "ours bf16": "#1b9e77",
    "ours tf32": "#7b4ea3",
    "ours fp32": "#66a61e",
    "ours deterministic": "#e7298a",
}
MARKERS = dict(zip(COLOURS, "sDv" + "oo^PXd", strict=True))
SMALLEST_MB = 1.0  # less is noise of the resident memory, and zero has no place on a log axis


@dataclass(frozen=True)
class Circumstances:
    """What all rows of a run share; empty where there is no value."""

    date: str
    commit: str
    command: str
    device: str
    driver: str
    torch: str
    triton: str


@dataclass(frozen=True)
class Row(Circumstances):
    """One line of the CSV."""

    implementation: str
    pass_: str  # forward, backward or both
    N: int
    D: int
    precision: str
    seconds: float
    ratio_to_naive: float | None
    times_floor: float | None
    peak_extra_mb: float


COLUMNS = [field.name.rstrip("_") for field in fields(Row)]


@dataclass(frozen=True)
class Point:
    """What the plot shows of one row."""

    seconds: float
    floor_seconds: float | None
    precision: str
    peak_extra_mb: float


@dataclass(frozen=True)
class Panel:
    """The latest points of one device and number of features, by implementation and by N."""

    title: str
    curves: dict[str, dict[int, Point]]

    def floor(self) -> tuple[dict[int, float], str]:
        """The lowest floor of each N, and the precision that it belongs to."""
        points = [
            (num_pixels, point.floor_seconds, point.precision)
            for curve in self.curves.values()
            for num_pixels, point in curve.items()
            if point.floor_seconds is not None
        ]
        # the slowest first, so that the lowest stays
        points.sort(key=lambda point: (point[0], -point[1]))
        lowest = {num_pixels: seconds for num_pixels, seconds, _ in points}
        return lowest, points[-1][2] if points else ""


def check_columns(path: Path) -> None:
    """Raise ValueError where `path` is a CSV file whose header is not that of Row."""
    if not path.exists() or not path.stat().st_size:
        return
    with path.open(newline="") as file:
        header = next(csv.reader(file))
    if header != COLUMNS:
        raise ValueError(
            f"{path} has the columns {','.join(header)}, not {','.join(COLUMNS)}; "
            "choose another --output"
        )


def append_rows(path: Path, rows: Iterable[Row]) -> None:
    """Append to the CSV file, which begins with a header; raises ValueError for another header."""
    check_columns(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if not file.tell():
            writer.writerow(COLUMNS)
        writer.writerows(astuple(row) for row in rows)


def read_panels(path: Path, *, device_type: str, features: list[int] | None) -> list[Panel]:
    """The latest rows of pass "both" per device, D, implementation and N; features None: all.

    Raises FileNotFoundError, or ValueError for a file of other columns or without such rows.
    """
    check_columns(path)
    curves: dict[tuple[str, int], dict[str, dict[int, Point]]] = defaultdict(dict)
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            is_cpu, num_features = row["device"].startswith("CPU"), int(row["D"])
            wanted = features is None or num_features in features
            if row["pass"] != "both" or is_cpu != (device_type == "cpu") or not wanted:
                continue
            seconds, times = float(row["seconds"]), row["times_floor"]
            curve = curves[row["device"], num_features].setdefault(row["implementation"], {})
            curve[int(row["N"])] = Point(
                seconds,
                seconds / float(times) if times else None,
                row["precision"],
                float(row["peak_extra_mb"]),
            )
    if not curves:
        raise ValueError(f"{path} has no rows of pass both, --device {device_type} and --features")
    return [
        Panel(f"{device}, D = {num_features}, forward and backward", curves[device, num_features])
        for device, num_features in sorted(curves)
    ]


def draw_panels(panels: list[Panel], path: Path) -> None:
    """Write a PNG: per panel, seconds and peak extra memory over N, both axes logarithmic."""
    # measuring needs no matplotlib
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1)  # inches
    figure = Figure(figsize=(11, 5 * len(panels)), layout=layout)
    parts = figure.subfigures(len(panels), 1, squeeze=False)[:, 0]
    for panel, part in zip(panels, parts, strict=True):
        time_axes, memory_axes = part.subplots(1, 2)
        _draw_seconds(panel, time_axes)
        _draw_memory(panel, memory_axes)
        sizes = sorted({num_pixels for curve in panel.curves.values() for num_pixels in curve})
        for axes in (time_axes, memory_axes):
            _label_sizes(axes, sizes)
        part.suptitle(panel.title, fontsize=12)
        handles, labels = time_axes.get_legend_handles_labels()
        columns = len(labels) if len(labels) <= 5 else math.ceil(len(labels) / 2)
        part.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _draw_seconds(panel: Panel, axes: "Axes") -> None:
    for name, curve in _in_order(panel):
        seconds = [curve[num_pixels].seconds for num_pixels in sorted(curve)]
        axes.plot(sorted(curve), seconds, label=name, **_style(name))
    floor, precision = panel.floor()
    if floor:
        label = f"floor, {precision}"
        axes.plot(list(floor), list(floor.values()), "--", color="black", lw=1.2, label=label)
    axes.set_ylabel("seconds")
    axes.set_yscale("log")


def _draw_memory(panel: Panel, axes: "Axes") -> None:
    lowest = math.inf
    for name, curve in _in_order(panel):
        sizes = [size for size in sorted(curve) if not math.isnan(curve[size].peak_extra_mb)]
        peaks = [curve[size].peak_extra_mb for size in sizes]
        axes.plot(sizes, [max(SMALLEST_MB, peak) for peak in peaks], **_style(name))
        lowest = min([lowest, *peaks])
    note = f" (below {SMALLEST_MB:g} drawn at {SMALLEST_MB:g})" if lowest < SMALLEST_MB else ""
    axes.set_ylabel(f"peak extra memory in MB{note}")
    axes.set_yscale("log")


def _label_sizes(axes: "Axes", sizes: list[int]) -> None:
    axes.set_xscale("log", base=2)
    names = [f"{size // 1024}k" if size % 1024 == 0 else str(size) for size in sizes]
    axes.set_xticks(sizes, names)
    axes.set_xticks([], minor=True)
    axes.set_xlabel("pixels N")
    axes.grid(alpha=0.3)


def _in_order(panel: Panel) -> list[tuple[str, dict[int, Point]]]:
    """The curves in the order of the colours, so that every panel's legend is the same."""
    order = list(COLOURS)
    return sorted(panel.curves.items(), key=lambda item: order.index(item[0]))


def _style(name: str) -> dict[str, Any]:
    return {"color": COLOURS[name], "marker": MARKERS[name], "markersize": 5.5, "linewidth": 1.6}
