"""Pictures of test patients: a few slices each, from the image over the maps to the mask.

Everything is drawn on the scan's own grid, where it was scored, with the patient's front up.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from cldf_dist.config import Config, Seeds
from cldf_dist.data.shards.table import SliceTable
from cldf_dist.data.slices import OUTSIDE, Geometry, to_native
from cldf_dist.labels import PixelLabel
from cldf_dist.maths.scaling import scale_to_unit
from cldf_dist.method.seeds import seed_labels
from cldf_dist.methods import method_named
from cldf_dist.scoring.mask_files import lps_transform, to_lps
from cldf_dist.scoring.masks import FloatArray, Mask, PatientScores
from cldf_dist.system.files import atomic_write

MASK_COLOUR, TRUTH_COLOUR = "#00e5ff", "#ffd400"
OBJECT_SEED, BACKGROUND_SEED = (0.90, 0.10, 0.15, 0.75), (0.15, 0.40, 0.95, 0.40)
PANEL_INCHES = 1.55
DOTS_PER_INCH = 100
COMPARED_COLUMNS, COMPARED_DOTS_PER_INCH = 7, 80  # small enough to be kept beside tables
TOP_PERCENTILE = 99.8


@dataclass(frozen=True)
class PatientResult:
    """Scores and masks of one test patient; the masks are in the orientation of its file."""

    scores: PatientScores
    geometry: Geometry
    method: str  # whose mask it is
    mask: Mask  # (x, y, slices)
    truth: Mask | None  # (x, y, slices)


@dataclass(frozen=True)
class _Panel:
    """One column: a picture (rows, columns) per drawn slice and what lies over it."""

    title: str
    pictures: FloatArray  # (height, width, slices)
    colours: str = "gray"
    low: float = OUTSIDE
    high: float = 1.0
    overlay: npt.NDArray[np.float32] | None = None  # (height, width, slices, RGBA)
    contour: Mask | None = None  # (height, width, slices)
    contour_colour: str = ""


def write_overlay(path: Path, result: PatientResult, table: SliceTable, config: Config) -> None:
    """Draw `report.slices_per_patient` slices of the patient, one a row, into a PNG.

    `table` holds the prepared slices of the patient's split.
    """
    drawn = drawn_slices(result, config.report.slices_per_patient)
    _figure(result, drawn, _panels(result, drawn, table, config)).savefig(path, dpi=DOTS_PER_INCH)


def write_comparison(
    path: Path, masks: Mapping[str, Mask], truth: Mask, geometry: Geometry, table: SliceTable
) -> None:
    """Draw the slice with the largest truth into a PNG: the image, the truth, each method's mask.

    `masks` (x, y, slices) by method and `truth` are in the orientation of the file; of a patient
    without object the slice with the largest mask is drawn. `table` is of the patient's split.
    """
    areas = sum((mask.astype(int) for mask in masks.values()), start=np.zeros(truth.shape, int))
    shown = to_lps(truth if truth.any() else areas, geometry).sum(axis=(0, 1))
    index = max(geometry.indices, key=lambda index: int(shown[index]))
    some = dataclasses.replace(geometry, indices=(index,))
    first = _first_channel(table, geometry.patient, [index], geometry.image_size)
    image = _whole_grey_scale(_pictures(to_native(first, some, OUTSIDE), geometry, [index]))
    panels = [
        _Panel("image", image),
        _contour_panel("truth", image, truth, TRUTH_COLOUR, geometry, [index]),
    ]
    for method, mask in masks.items():
        title = method_named(method).title
        panels.append(_contour_panel(title, image, mask, MASK_COLOUR, geometry, [index]))
    columns = min(COMPARED_COLUMNS, len(panels))
    lines = -(-len(panels) // columns)
    size = (PANEL_INCHES * columns, (PANEL_INCHES + 0.2) * lines)
    figure = Figure(figsize=size, facecolor="white", layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes, panel in zip(grid, panels):
        _draw(axes, panel, 0, _pixel_aspect(geometry))
        axes.set_title(panel.title, fontsize=8)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    with atomic_write(path) as file:
        figure.savefig(file, dpi=COMPARED_DOTS_PER_INCH, format="png", metadata={"Software": None})


def drawn_slices(result: PatientResult, count: int) -> list[int]:
    """Slice numbers to show, ascending: spread over the object, large parts first.

    The object is the true one, or the predicted one where nobody drew the truth. Of a patient
    without object the middle slices are shown.
    """
    kept = np.asarray(result.geometry.indices)
    volume = result.mask if result.truth is None else result.truth
    area = to_lps(volume, result.geometry).sum(axis=(0, 1))[kept].astype(float)
    if not area.any():  # the middle half
        area[len(kept) // 4 : max(len(kept) - len(kept) // 4, 1)] = 1
    count = min(count, int(np.count_nonzero(area)))
    quantiles = (np.arange(count) + 0.5) / count
    chosen = set(np.searchsorted(np.cumsum(area) / area.sum(), quantiles).tolist())
    by_area = np.argsort(-area, kind="stable").tolist()
    spare = (position for position in by_area if position not in chosen)
    while len(chosen) < count:  # one large slice can hold several quantiles
        chosen.add(next(spare))
    return [int(kept[position]) for position in sorted(chosen)]


def _panels(
    result: PatientResult, drawn: Sequence[int], table: SliceTable, config: Config
) -> list[_Panel]:
    """The columns of the picture."""
    scores, geometry = result.scores, result.geometry
    rows = [geometry.indices.index(index) for index in drawn]

    def on_scan(maps: FloatArray, fill: float = 0.0) -> FloatArray:
        """Maps of the drawn slices, (slices, height, width), upright on the scan's grid."""
        some = dataclasses.replace(geometry, indices=tuple(drawn))
        volume = to_native(np.ascontiguousarray(maps, dtype=np.float32), some, fill)
        return _pictures(volume, geometry, drawn)

    def score_panel(method: str, title: str) -> _Panel:
        values = scores.scores[method]
        inside = values[scores.body_mask]
        top = float(np.percentile(inside, TOP_PERCENTILE)) if inside.size else 1.0
        high = max(top, 1e-12) if not method_named(method).is_bounded else 1.0
        shown = np.where(scores.body_mask, values, 0)[rows]
        return _Panel(title, on_scan(shown), "magma", 0.0, high)

    first = _first_channel(table, scores.patient, drawn, geometry.image_size)
    image = _whole_grey_scale(on_scan(first, fill=OUTSIDE))
    cam = config.seeds.cam
    cam_title = f"CAM ({method_named(cam).title})" if cam != "auto" else "CAM"
    titles = {cam: cam_title, "gradient_map": method_named("gradient_map").title}
    maps = [score_panel(row, titles[row]) for row in titles if row in scores.scores]
    if len(maps) == len(titles):  # segment.methods may leave either out, and "auto" is no map
        seeds = _would_be_seeds(scores, rows, config)
        colours = _seed_colours(
            on_scan(seeds == PixelLabel.OBJECT), on_scan(seeds == PixelLabel.BACKGROUND)
        )
        maps.append(_Panel("seeds (as they\nwould be)", image, overlay=colours))
    if "cdm" in scores.scores:
        maps.append(score_panel("cdm", method_named("cdm").title))
    title = method_named(result.method).title
    panels = [
        _Panel("image", image),
        *maps,
        score_panel(result.method, f"{title} score"),
        _contour_panel(f"{title} mask", image, result.mask, MASK_COLOUR, geometry, drawn),
    ]
    if result.truth is None:
        return [*panels, _Panel("truth (none drawn)", image)]
    return [*panels, _contour_panel("truth", image, result.truth, TRUTH_COLOUR, geometry, drawn)]


def _contour_panel(
    title: str, image: FloatArray, mask: Mask, colour: str, geometry: Geometry, drawn: Sequence[int]
) -> _Panel:
    contour = _pictures(mask, geometry, drawn)
    return _Panel(title, image, contour=contour, contour_colour=colour)


def _would_be_seeds(
    scores: PatientScores, rows: Sequence[int], config: Config
) -> npt.NDArray[np.int8]:
    """Seeds by the rule of the cache, with the gate's decision in place of the slice label."""
    settings: Seeds = config.seeds
    inside = torch.from_numpy(scores.body_mask[rows])
    threshold = config.segment.gate_probability or 0.5
    maps = {
        method: scale_to_unit(torch.from_numpy(scores.scores[method][rows]), inside)
        for method in ("gradient_map", config.seeds.cam)
    }
    seeds = seed_labels(
        maps["gradient_map"],
        maps[config.seeds.cam],
        inside,
        torch.from_numpy((scores.probability[rows] >= threshold).astype(np.int64)),
        rule=settings.rule,
        object_threshold=settings.object_threshold,
        background_threshold=settings.background_threshold,
        negative_slices=settings.negative_slices,
    )
    return np.asarray(seeds.numpy(), dtype=np.int8)


def _seed_colours(is_object: FloatArray, is_background: FloatArray) -> npt.NDArray[np.float32]:
    colours = np.zeros((*is_object.shape, 4), dtype=np.float32)
    colours[is_background > 0.5] = BACKGROUND_SEED
    colours[is_object > 0.5] = OBJECT_SEED
    return colours


def _first_channel(
    table: SliceTable, patient: str, drawn: Sequence[int], image_size: int
) -> FloatArray:
    """The prepared images (slices, height, width); black where a slice was dropped as damaged."""
    row_of = {int(table.indices[r]): r for r, name in enumerate(table.patients) if name == patient}
    images = {index: table.read_image(row_of[index])[0] for index in drawn if index in row_of}
    blank = np.full((image_size, image_size), OUTSIDE, dtype=np.float32)
    return np.stack([images.get(index, blank) for index in drawn])


def _whole_grey_scale(image: FloatArray) -> FloatArray:
    """The picture scaled so that its brightest pixels are 1."""
    brightest = float(np.percentile(image, TOP_PERCENTILE))
    if brightest <= OUTSIDE:
        return image
    return (image - OUTSIDE) * (1 - OUTSIDE) / (brightest - OUTSIDE) + OUTSIDE


def _pictures(
    volume: npt.NDArray[Any], geometry: Geometry, drawn: Sequence[int]
) -> npt.NDArray[Any]:
    """The drawn slices of a volume, cropped to the body: (height, width, slices)."""
    x0, x1, y0, y1 = (max(edge, 0) for edge in geometry.box)
    cropped = to_lps(volume, geometry)[x0:x1, y0:y1, list(drawn)]
    return np.ascontiguousarray(cropped.transpose(1, 0, 2))


def _pixel_aspect(geometry: Geometry) -> float:
    """Height of a pixel over its width, as drawn."""
    place = lps_transform(geometry)[:, 0].astype(int).tolist()
    return geometry.spacing[place.index(1)] / geometry.spacing[place.index(0)]


def _figure(result: PatientResult, drawn: Sequence[int], panels: Sequence[_Panel]) -> Figure:
    width, height = PANEL_INCHES * len(panels) + 0.5, PANEL_INCHES * len(drawn) + 0.75
    figure = Figure(figsize=(width, height), facecolor="white")
    grid = figure.subplots(
        len(drawn),
        len(panels),
        squeeze=False,
        gridspec_kw={
            "left": 0.42 / width,
            "right": 1 - 0.04 / width,
            "top": 1 - 0.38 / height,
            "bottom": 0.34 / height,
            "wspace": 0.03,
            "hspace": 0.03,
        },
    )
    aspect = _pixel_aspect(result.geometry)
    for row, index in enumerate(drawn):
        for column, panel in enumerate(panels):
            _draw(grid[row, column], panel, row, aspect)
        probability = result.scores.probability[result.geometry.indices.index(index)]
        grid[row, 0].set_ylabel(f"slice {index}\np(object) {probability:.2f}", fontsize=7)
    for column, panel in enumerate(panels):
        grid[0, column].set_title(panel.title, fontsize=8, pad=4)
    figure.legend(handles=_legend(), loc="lower center", ncols=6, fontsize=7, frameon=False)
    return figure


def _draw(axes: Any, panel: _Panel, row: int, aspect: float) -> None:
    axes.set(xticks=[], yticks=[], facecolor="black")
    axes.imshow(
        panel.pictures[..., row],
        cmap=panel.colours,
        vmin=panel.low,
        vmax=panel.high,
        aspect=aspect,
        interpolation="nearest",
    )
    if panel.overlay is not None:
        axes.imshow(panel.overlay[..., row, :], aspect=aspect, interpolation="nearest")
    if panel.contour is not None:
        # a frame of zeros closes the contour of a mask at the border
        padded = np.pad(panel.contour[..., row].astype(float), 1)
        if padded.any():
            y, x = (np.arange(size) - 1 for size in padded.shape)
            axes.contour(x, y, padded, levels=[0.5], colors=panel.contour_colour, linewidths=1.1)


def _legend() -> list[Any]:
    return [
        Line2D([], [], color=MASK_COLOUR, label="mask"),
        Line2D([], [], color=TRUTH_COLOUR, label="truth"),
        Patch(color=OBJECT_SEED, label="object seed"),
        Patch(color=BACKGROUND_SEED, label="background seed"),
        Line2D([], [], color="none", label="maps: before gate and threshold, black 0 to white 1"),
        Line2D([], [], color="none", label=f"CDM: to the patient's {TOP_PERCENTILE} percentile"),
    ]
