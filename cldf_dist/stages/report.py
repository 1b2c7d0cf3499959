"""One self-contained HTML page of a run: scores, pictures, curves, times, settings, provenance."""

from __future__ import annotations

import base64
import csv
import io
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.figure import Figure

from cldf_dist.config import Config, to_yaml
from cldf_dist.data.readers.objects import object_title
from cldf_dist.data.shards.remote import ShardCache
from cldf_dist.data.shards.table import ShardSet
from cldf_dist.inference.seed_cam import with_map
from cldf_dist.methods import Role, mark, method_named
from cldf_dist.runs.run import DONE, Run, read_json, seconds_of, write_atomically
from cldf_dist.scoring.figures import PatientResult, write_overlay
from cldf_dist.scoring.mask_files import mask_path, read_mask, truth_path
from cldf_dist.scoring.masks import PatientScores
from cldf_dist.scoring.strict_protocol import COMPARISONS, HEADLINE
from cldf_dist.scoring.table_writer import format_number
from cldf_dist.scoring.tables import (
    SEEDS,
    comparison_table,
    gate_table,
    slices_table,
    strict_table,
)
from cldf_dist.stages import STAGES
from cldf_dist.system.progress import progress

TEMPLATE = "report_template.html"
MAX_EMBEDDED = 24  # pictures in the page; those of the other patients stay files beside it
ACCENT, PLAIN = "#b5332e", "#4a6785"
COLOURS = {Role.OURS: ACCENT, Role.UPPER_BOUND: "#9a8f7f"}  # PLAIN for the others
OUTCOMES = {
    "miss": "missed: Dice 0",
    "false_alarm": "false alarm: no object, yet a mask",
    "true_negative": "no object, none found",
}

Row = dict[str, str]  # of cases.csv


def execute(config: Config, run: Run) -> dict[str, Any]:
    """Write overlays/<patient>.png and report.html; return the page's name and the number of
    pictures for DONE."""
    evaluated = run.needs("evaluate")
    summary = read_json(evaluated / "summary.json")
    with (evaluated / "cases.csv").open() as file:
        cases = list(csv.DictReader(file))
    drawn = with_map(config, summary["seed_cam"])
    pictures = _draw_overlays(drawn, run, cases, summary["mask_method"])
    page = _page(config, run.folder.parent, summary, cases, pictures)
    write_atomically(run.folder / "report.html", page)
    return {"report": "report.html", "num_pictures": len(pictures)}


def _draw_overlays(config: Config, run: Run, cases: Sequence[Row], method: str) -> dict[str, Path]:
    """Draw each test patient with the mask of `method`; the files, the lowest Dice first."""
    prepare, segment = run.needs("prepare"), run.needs("segment")
    shards = ShardSet(prepare, on_damaged=config.data.on_damaged, cache=ShardCache.of(config.data))
    table = shards.split("test")
    folder = run.folder / "overlays"
    folder.mkdir(parents=True, exist_ok=True)
    patients = sorted(set(table.patients), key=lambda name: _rank(cases, name, method))
    with progress("report", len(patients), "patients") as counter:
        for patient in patients:
            truth = truth_path(prepare, patient)
            result = PatientResult(
                scores=PatientScores.load(segment / "scores", patient),
                geometry=shards.geometry(patient),
                method=method,
                mask=read_mask(mask_path(segment, method, patient)),
                truth=read_mask(truth) if truth.is_file() else None,
            )
            write_overlay(folder / f"{patient}.png", result, table, config)
            counter.advance()
    return {patient: folder / f"{patient}.png" for patient in patients}


def _rank(cases: Sequence[Row], patient: str, method: str) -> tuple[float, str]:
    case = _case_of(cases, patient, method)
    return (float(case["dice"]) if case and case["dice"] else 2.0, patient)


def _case_of(cases: Sequence[Row], patient: str, method: str) -> Row | None:
    """The headline case of a patient under `method`; None where it could not be scored."""
    wanted = (patient, method, HEADLINE)
    found = (case for case in cases if (case["patient"], case["method"], case["rule"]) == wanted)
    return next(found, None)


def _page(
    config: Config,
    folder: Path,
    summary: Mapping[str, Any],
    cases: Sequence[Row],
    pictures: Mapping[str, Path],
) -> str:
    """The HTML."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(method_named=method_named, mark=mark, number=format_number)
    method = summary["mask_method"]
    page: str = environment.get_template(TEMPLATE).render(
        config=config,
        channels=ShardSet(folder / "prepare", on_damaged="skip").manifest["channels"],
        target=object_title(config.data),
        strict=summary["strict"],
        tables=_tables(summary),
        has_upper_bounds=any(method_named(m).saw_masks for m in summary["strict"]["methods"]),
        seeds={method_named(ours).title: summary[key] for ours, key in SEEDS.items()},
        dice_chart=_dice_chart(summary["strict"], cases) if cases else "",
        overlays=[
            {"patient": name, "caption": _caption(cases, name, method), "uri": _png(pictures[name])}
            for name in _evenly(list(pictures), MAX_EMBEDDED)
        ],
        num_pictures=len(pictures),
        curves=_all_curves(folder),
        times=_times(folder),
        starts=_starts(folder),
        yaml=to_yaml(config),
    )
    return page


def _tables(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The tables of the page by their place."""
    strict, slices = summary["strict"], summary["slice_protocol"]
    return {
        "strict": strict_table(strict["methods"], strict["oracle_threshold"]),
        "otsu": strict_table(strict["methods_otsu"]),
        "comparisons": [
            comparison_table(ours, strict[key]) for ours, key in COMPARISONS.items() if strict[key]
        ],
        "slices": slices_table(slices["methods"]),
        "slices_largest_component": slices_table(slices["methods_largest_component"]),
        "gate": gate_table(summary["gate"]),
    }


def _evenly(names: list[str], count: int) -> list[str]:
    """At most `count` of the names, the first and the last among them."""
    if len(names) <= count:
        return names
    return [names[round(i * (len(names) - 1) / (count - 1))] for i in range(count)]


def _caption(cases: Sequence[Row], patient: str, method: str) -> str:
    case = _case_of(cases, patient, method)
    if case is None:
        return "no truth mask: not scored"
    truth, found = float(case["truth_ml"]), float(case["predicted_ml"])
    score = OUTCOMES.get(case["outcome"])
    if score is None:
        score = f"Dice {float(case['dice']):.3f}, HD95 {float(case['hd95_mm']):.1f} mm"
    return f"{score}; object {truth:.1f} ml, mask {found:.1f} ml"


def _png(path: Path) -> str:
    return _data_uri(path.read_bytes(), "image/png")


def _svg(figure: Figure) -> str:
    content = io.BytesIO()
    figure.savefig(content, format="svg", metadata={"Date": None})
    return _data_uri(content.getvalue(), "image/svg+xml")


def _data_uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _dice_chart(strict: Mapping[str, Any], cases: Sequence[Row]) -> str:
    """Each patient's Dice as a dot, one line a method, and the mean with its interval."""
    methods = list(strict["methods"])
    figure = Figure(figsize=(9.5, 0.42 * len(methods) + 0.8), layout="constrained")
    axes = figure.subplots()
    for line, method in enumerate(methods):
        colour = COLOURS.get(method_named(method).role, PLAIN)
        dice = [
            float(case["dice"])
            for case in cases
            if case["method"] == method and case["rule"] == HEADLINE and case["dice"]
        ]
        axes.scatter(dice, [line] * len(dice), s=26, color=colour, alpha=0.35, linewidths=0)
        mean = strict["methods"][method]["dice"]
        if mean["low"] is not None:
            axes.plot([mean["low"], mean["high"]], [line, line], color=colour, linewidth=2.5)
        if mean["mean"] is not None:
            axes.plot(mean["mean"], line, "D", color=colour, markersize=7, mec="white")
    labels = [method_named(method).title + mark(method) for method in methods]
    axes.set_yticks(range(len(methods)), labels)
    axes.set(xlim=(-0.02, 1.02), ylim=(len(methods) - 0.5, -0.5), xlabel="Dice per patient")
    _sober(axes)
    return _svg(figure)


def _all_curves(folder: Path) -> list[dict[str, str]]:
    """The curves of every training of the run, in the order of the stages."""
    found = []
    for stage in STAGES:
        for path in sorted((folder / stage.name).glob("**/metrics.jsonl")):
            series = _series(path)
            if stage.fit_section and series:
                name = path.parent.relative_to(folder).as_posix()
                found.append({"name": name, "uri": _svg(_curves(series))})
    return found


def _series(path: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) by metric, of the losses and accuracies."""
    series: dict[str, list[tuple[int, float]]] = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise ValueError(
                f"{path}, line {number}, is damaged: {error}; delete the line and run: cldf report"
            ) from error
        for key, value in entry.items():
            if key.split("/")[0] in ("train", "validation") and _kind(key) is not None:
                series.setdefault(key, []).append((entry["step"], value))
    return series


def _kind(key: str) -> str | None:
    return next((kind for kind in ("loss", "accuracy") if key.endswith(kind)), None)


def _curves(series: Mapping[str, Sequence[tuple[int, float]]]) -> Figure:
    kinds = sorted({str(_kind(key)) for key in series}, reverse=True)  # the loss first
    figure = Figure(figsize=(4.9 * len(kinds), 2.6), layout="constrained")
    for axes, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds):
        lowest, highest = float("inf"), 0.0
        for key, points in series.items():
            if _kind(key) != kind:
                continue
            steps, values = zip(*points)
            is_validation = key.startswith("validation")
            axes.plot(
                steps,
                values,
                color=ACCENT if is_validation else PLAIN,
                linewidth=1.6 if is_validation else 1.0,
                marker="o" if is_validation else "",
                markersize=3,
                label=key,
            )
            lowest, highest = min(lowest, *values), max(highest, *values)
        if kind == "loss" and 0 < 10 * lowest < highest:
            axes.set_yscale("log")
        axes.set(xlabel="step", ylabel=kind)
        axes.legend(fontsize=7, frameon=False)
        _sober(axes)
    return figure


def _sober(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e4e1db", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8)
    axes.xaxis.label.set_size(8)
    axes.yaxis.label.set_size(8)


def _times(folder: Path) -> list[tuple[str, float]]:
    """Seconds of each finished stage, over all its starts."""
    return [
        (stage.name, seconds_of(folder / stage.name))
        for stage in STAGES
        if (folder / stage.name / DONE).is_file()
    ]


def _starts(folder: Path) -> list[dict[str, Any]]:
    """The last start of each stage from its provenance.json, and how many there were."""
    found = []
    for stage in STAGES:
        path = folder / stage.name / "provenance.json"
        if path.is_file():
            starts = read_json(path)["starts"]
            state = starts[-1]["git"]
            commit = state["commit"][:10] + (" + changes" if state["dirty"] else "")
            command = shlex.join(starts[-1]["command"])
            own = {"stage": stage.name, "num_starts": len(starts)}
            found.append({**starts[-1], **own, "commit": commit, "command": command})
    return found
