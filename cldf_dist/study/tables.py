"""tables.md: what a study found, made from its CSV files alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from cldf_dist.method.repeated_trainings import paired_over_trainings, training_means
from cldf_dist.method.statistics import holm
from cldf_dist.methods import marked, method_named
from cldf_dist.runs.run import write_atomically
from cldf_dist.study.ablations import ablation_table, seed_quality
from cldf_dist.study.cells import (
    counts_cell,
    difference_cell,
    mean_cell,
    number_cell,
    seeds_cell,
    shares_cell,
    table,
)
from cldf_dist.study.plan import BASE
from cldf_dist.study.rows import COMPONENTS, Row, methods_of, read_results
from cldf_dist.study.scores import StrictScores, picked_by, picked_patients

TABLES = "tables.md"
PICTURES = ("best", "median", "worst")
CSV_FILES = (
    "cases",
    "slice_protocol",
    "weak_validation",
    "seeds",
    "oracle_intensity",
    "provenance",
)
ABOUT = """\
# Tables of the study

Made by `cldf study` from the CSV files beside it. Strict protocol (docs/method.md): whole patients,
all slices, one threshold per method set without masks. A mean is over the patients with a defined
score: a true negative (no object, none found) has no Dice and is left out, a miss and a false alarm
have Dice 0. `*` saw training masks, `†` was chosen with the test masks: references, not
competitors.

Intervals are 95 % bootstrap intervals over trainings and patients, both drawn at once; few of
either make them too narrow. p-values are over patients and hold for these trainings: a difference
is established where its interval excludes zero too."""

Files = Mapping[str, list[Row]]


def write_tables(results: Path) -> Path:
    """Make tables.md anew; its path. FileNotFoundError where no run has left its numbers yet."""
    files = {name: read_results(results, name) for name in CSV_FILES}
    if not any(files.values()):
        raise FileNotFoundError(f"{results} holds no rows of a study; run: cldf study STUDY")
    blocks = [ABOUT]
    known = [row["experiment"] for name in ("cases", "provenance") for row in files[name]]
    for experiment in dict.fromkeys(known):
        rows = {
            name: [row for row in content if row["experiment"] == experiment]
            for name, content in files.items()
        }
        blocks += _experiment(experiment, rows, results)
    target = results / TABLES
    write_atomically(target, "\n\n".join(blocks) + "\n")
    return target


def picture_names(experiment: str) -> list[str]:
    """The files of the three patients' pictures."""
    return [f"{experiment}_{which}.png" for which in PICTURES]


def _experiment(name: str, rows: Files, results: Path) -> list[str]:
    base = {
        file: [row for row in content if row["variant"] == BASE] for file, content in rows.items()
    }
    blocks = [f"## {name}", _made_by(rows["provenance"])]
    if base["cases"]:
        scores = StrictScores.of(base["cases"])
        blocks += ["### Strict scores", _strict_table(scores)]
        if base["oracle_intensity"]:
            blocks.append(_thresholds(base["oracle_intensity"]))
        for ours in scores.ours:
            blocks += [f"### {ours} minus the other methods", _paired_table(scores, ours)]
        blocks += _pictures(name, scores, results)
        if base["seeds"]:
            blocks += ["### Seeds", _seeds_table(base["seeds"])]
        blocks += ["### Without any mask", _weak_table(base["weak_validation"])]
        blocks += [
            "### As papers score (slice protocol)",
            _slice_protocol_table(base["slice_protocol"]),
        ]
    else:
        blocks.append("No test patient has a truth mask: no mask is scored.")
    if any(row["variant"] != BASE for row in rows["cases"]):
        blocks += ["### Ablations", ablation_table(rows["cases"], rows["seeds"])]
    return blocks


def _seeds_table(rows: Sequence[Row]) -> str:
    """The table of seed quality of each of our methods, by training."""
    seeds = tuple(dict.fromkeys(row["seed"] for row in rows))
    lines = [
        [
            method,
            *(
                seed_quality([r for r in rows if (r["method"], r["seed"]) == (method, s)])
                for s in seeds
            ),
        ]
        for method in dict.fromkeys(row["method"] for row in rows)
    ]
    said = "Precision and recall of object seeds on training slices: diagnostics that see masks."
    return f"{said}\n\n{table(['row', *(f'seed {seed}' for seed in seeds)], lines)}"


def _made_by(provenance: Sequence[Row]) -> str:
    def all_of(column: str) -> str:
        return ", ".join(dict.fromkeys(row[column] for row in provenance)) or "unknown"

    hours = sum(float(row["seconds"]) for row in provenance) / 3600
    return (
        f"Commit {all_of('commit')}; torch {all_of('torch')}; {all_of('device')}, "
        f"{all_of('processes')} process(es); {len(provenance)} run(s), {hours:.2f} hours of stages "
        "(a stage that several runs share counts in each)."
    )


def _strict_table(scores: StrictScores) -> str:
    header = [
        "method", *(f"seed {seed}" for seed in scores.seeds), "Dice [95 %]", "IoU [95 %]",
        "HD95, mm [95 %]", "misses", "false alarms",
    ]  # fmt: skip
    lines = []
    for method in scores.methods:
        dice, exists = scores.values(method, "dice"), scores.exists(method)
        lines.append(
            [
                marked(method),
                *(number_cell(mean) for mean in training_means(dice)),
                mean_cell(dice, exists=exists),
                mean_cell(scores.values(method, "iou"), exists=exists),
                mean_cell(scores.values(method, "hd95_mm"), digits=1, exists=exists),
                counts_cell(scores.count(method, "miss")),
                counts_cell(scores.count(method, "false_alarm")),
            ]
        )
    said = (
        f"{len(scores.patients)} test patients, {len(scores.seeds)} training(s): Dice of each "
        "seed, then means over seeds; misses and false alarms of each seed."
    )
    return f"{said}\n\n{table(header, lines)}"


def _thresholds(rows: Sequence[Row]) -> str:
    chosen = [
        f"seed {row['seed']}: {row['channel']} {'above' if row['above'] == 'True' else 'below'} "
        f"{number_cell(_float(row['threshold']))}"
        for row in rows
        if row.get("channel")
    ]
    return f"`oracle_intensity` is the best threshold on one channel ({'; '.join(chosen)})."


def _paired_table(scores: StrictScores, ours: str) -> str:
    mine = scores.values(ours, "dice")
    found = {
        method: paired_over_trainings(mine, scores.values(method, "dice"))
        for method in scores.methods
        if method != ours
    }
    both = {
        method: [a and b for a, b in zip(scores.exists(ours), scores.exists(method))]
        for method in found
    }
    family = {
        method: row.p
        for method, row in found.items()
        if row.p is not None and all(both[method]) and not method_named(method).saw_masks
    }
    adjusted = holm(family)
    lines = [
        [
            marked(method),
            difference_cell(row, both[method]),
            seeds_cell(row.of_trainings),
            number_cell(family.get(method), 4),
            number_cell(adjusted.get(method), 4),
            shares_cell(row.num_better, row.num_compared),
            shares_cell(row.num_worse, row.num_compared),
            str(row.num_patients),
        ]
        for method, row in found.items()
    ]
    header = ["minus", "Dice [95 %]", "each seed", "p", "p (Holm)", "better", "worse", "patients"]
    said = (
        "Mean difference of Dice; two-sided permutation test of each patient's difference, "
        "averaged over the seeds; Holm's adjustment over the methods that saw no mask; how many "
        "patients are better and worse in each seed."
    )
    return f"{said}\n\n{table(header, lines)}"


def _pictures(name: str, scores: StrictScores, results: Path) -> list[str]:
    picked = picked_patients(scores)
    lines = [
        f"- [{which} patient]({file}): {picked[which][0]}, Dice {picked[which][1]:.3f}"
        for which, file in zip(PICTURES, picture_names(name))
        if which in picked and (results / file).is_file()
    ]
    if not lines:
        return []
    said = f"By the Dice of `{picked_by(scores)}` with seed {scores.seeds[0]}:"
    return ["### Pictures", f"{said}\n\n" + "\n".join(lines)]


def _weak_table(rows: Sequence[Row]) -> str:
    """The table of rank correlations between slice labels alone and strict Dice."""
    lines = []
    for seed in dict.fromkeys(row["seed"] for row in rows):
        pairs = [
            (float(row["area_auroc"]), float(row["dice"]))
            for row in rows
            if row["seed"] == seed and not method_named(row["method"]).saw_masks
            and row["area_auroc"] and row["dice"]
        ]  # fmt: skip
        lines.append([seed, number_cell(rank_correlation(pairs), signed=True), str(len(pairs))])
    said = (
        "Spearman's rank correlation, over the methods that used no mask, between the AUROC of a "
        "slice's marked area for its label (validation patients) and strict Dice (test patients)."
    )
    return f"{said}\n\n{table(['seed', 'rank correlation', 'rows'], lines)}"


def rank_correlation(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Spearman's; None for fewer than three pairs and where either side is constant."""
    if len(pairs) < 3 or any(len(set(side)) < 2 for side in zip(*pairs)):
        return None
    from scipy.stats import spearmanr

    return float(spearmanr(*zip(*pairs)).statistic)


def _slice_protocol_table(rows: Sequence[Row]) -> str:
    metrics = {"dice": 3, "iou": 3, "hd95_pixels": 1, "hd95_contour_pixels": 1}
    lines = []
    for method in methods_of(rows):
        cells = []
        for components in COMPONENTS:
            mine = [r for r in rows if (r["method"], r["components"]) == (method, components)]
            for metric, digits in metrics.items():
                values = [float(row[metric]) for row in mine if row[metric]]
                cells.append(number_cell(float(np.mean(values)), digits) if values else "-")
        lines.append([marked(method), *cells])
    header = ["Dice", "IoU", "HD95 px", "HD95 px (contours)"]
    largest = [f"{name}, largest component" for name in header]
    said = (
        "Only to compare with papers, never beside the strict numbers: slices with the object "
        "alone, Otsu's threshold within each, mean over slices and then over seeds."
    )
    return f"{said}\n\n{table(['row', *header, *largest], lines)}"


def _float(text: str) -> float | None:
    return float(text) if text else None
