"""tables.md of a study, made from its CSV files alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from cldf_dist.method.repeated_trainings import (
    PairedDifference,
    Scores,
    crossed_interval,
    mean_of_trainings,
    paired_over_trainings,
    training_means,
)
from cldf_dist.method.statistics import holm
from cldf_dist.methods import ORACLE_INTENSITY, method_named
from cldf_dist.runs.run import write_atomically
from cldf_dist.scoring.table_writer import Cell, Table, format_interval, format_number
from cldf_dist.scoring.tables import threshold_in_words
from cldf_dist.study.ablations import ablation_table, seed_quality
from cldf_dist.study.plan import BASE
from cldf_dist.study.rows import (
    COLUMNS,
    COMPONENTS,
    Row,
    column_mean,
    read_results,
    select,
    values_of,
)
from cldf_dist.study.scores import StrictScores, picked_by, picked_patients

TABLES = "tables.md"
PICTURES = ("best", "median", "worst")
ABOUT = """\
# Tables of the study

Made by `cldf study` from the CSV files beside it. Strict protocol (docs/method.md): whole patients,
all slices, one threshold per method, set without masks. A mean is over the patients with a defined
score. A true negative (no object, none found) has no Dice and is left out; a miss and a false alarm
have Dice 0. `*` saw training masks, `†` was chosen with the test masks: references, not
competitors.

Intervals are 95 % bootstrap intervals over trainings and patients, both resampled together; with
few of either they are too narrow. p-values are over patients and hold for these trainings. A
difference is established only where its 95 % interval excludes zero as well."""

Files = Mapping[str, list[Row]]


def write_tables(results: Path) -> Path:
    """Write tables.md; return its path. FileNotFoundError where no run has left results yet."""
    files = {name: read_results(results, name) for name in COLUMNS}
    if not any(files.values()):
        raise FileNotFoundError(f"{results} holds no rows of a study; run: cldf study STUDY")
    blocks = [ABOUT]
    for experiment in values_of([*files["cases"], *files["provenance"]], "experiment"):
        rows = {name: select(content, experiment=experiment) for name, content in files.items()}
        blocks += _experiment(experiment, rows, results)
    target = results / TABLES
    write_atomically(target, "\n\n".join(blocks) + "\n")
    return target


def picture_names(experiment: str) -> list[str]:
    """The file names of the three patients' pictures."""
    return [f"{experiment}_{which}.png" for which in PICTURES]


def rank_correlation(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Spearman's; None for fewer than three pairs and where either side is constant."""
    if len(pairs) < 3 or any(len(set(side)) < 2 for side in zip(*pairs)):
        return None
    from scipy.stats import spearmanr

    return float(spearmanr(*zip(*pairs)).statistic)


def _experiment(name: str, rows: Files, results: Path) -> list[str]:
    """The headings, sentences and tables of one experiment."""
    base = {file: select(content, variant=BASE) for file, content in rows.items()}
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
            "### Slice protocol (for comparison with papers)",
            _slice_protocol_table(base["slice_protocol"]),
        ]
    else:
        blocks.append("No test patient has a truth mask: no mask is scored.")
    if any(row["variant"] != BASE for row in rows["cases"]):
        blocks += ["### Ablations", ablation_table(rows["cases"], rows["seeds"])]
    return blocks


def _made_by(provenance: Sequence[Row]) -> str:
    commit, torch, device, processes = (
        ", ".join(values_of(provenance, column)) or "unknown"
        for column in ("commit", "torch", "device", "processes")
    )
    hours = sum(float(row["seconds"]) for row in provenance) / 3600
    return (
        f"Commit {commit}; torch {torch}; {device}, {processes} process(es); {len(provenance)} "
        f"run(s), {hours:.2f} hours of stages (a stage that several runs share counts in each)."
    )


def _strict_table(scores: StrictScores) -> str:
    header = [
        "method", *(f"seed {seed}" for seed in scores.seeds), "Dice [95 %]", "IoU [95 %]",
        "HD95, mm [95 %]", "misses", "false alarms",
    ]  # fmt: skip
    lines: list[list[str | Cell]] = []
    for method in scores.methods:
        dice, exists = scores.values(method, "dice"), scores.exists(method)
        lines.append(
            [
                method,
                *map(format_number, training_means(dice)),
                _mean_cell(dice, exists),
                _mean_cell(scores.values(method, "iou"), exists),
                _mean_cell(scores.values(method, "hd95_mm"), exists, digits=1),
                _counts(scores.count(method, "miss")),
                _counts(scores.count(method, "false_alarm")),
            ]
        )
    about = (
        f"{len(scores.patients)} test patients, {len(scores.seeds)} training(s): Dice of each "
        "seed, then means over seeds; misses and false alarms of each seed."
    )
    return f"{about}\n\n{Table(header, lines).markdown()}"


def _thresholds(rows: Sequence[Row]) -> str:
    chosen = [
        f"seed {row['seed']}: "
        + threshold_in_words(row["channel"], row["above"] == "True", _float(row["threshold"]))
        for row in rows
        if row.get("channel")
    ]
    return f"`{ORACLE_INTENSITY}` is the best threshold on one channel ({'; '.join(chosen)})."


def _paired_table(scores: StrictScores, ours: str) -> str:
    mine = scores.values(ours, "dice")
    others = [method for method in scores.methods if method != ours]
    found = {m: paired_over_trainings(mine, scores.values(m, "dice")) for m in others}
    both = {
        method: [a and b for a, b in zip(scores.exists(ours), scores.exists(method))]
        for method in others
    }
    family = {
        method: row.p
        for method, row in found.items()
        if row.p is not None and all(both[method]) and not method_named(method).saw_masks
    }
    adjusted = holm(family)
    lines: list[list[str | Cell]] = [
        [
            method,
            _of_trainings(format_interval(row.difference, row.low, row.high, signed=True), exists),
            ", ".join(format_number(value, signed=True) for value in row.of_trainings),
            format_number(family.get(method), 4),
            format_number(adjusted.get(method), 4),
            _fractions(row.num_better, row),
            _fractions(row.num_worse, row),
            str(row.num_patients),
        ]
        for (method, row), exists in zip(found.items(), both.values())
    ]
    header = ["minus", "Dice [95 %]", "each seed", "p", "p (Holm)", "better", "worse", "patients"]
    about = (
        "Mean difference of Dice; two-sided permutation test of each patient's difference, "
        "averaged over the seeds; Holm's adjustment over the methods that saw no mask; number of "
        "patients with a better and with a worse Dice in each seed."
    )
    return f"{about}\n\n{Table(header, lines).markdown()}"


def _pictures(name: str, scores: StrictScores, results: Path) -> list[str]:
    picked = picked_patients(scores)
    lines = [
        f"- [{which} patient]({file}): {picked[which][0]}, Dice {picked[which][1]:.3f}"
        for which, file in zip(PICTURES, picture_names(name))
        if which in picked and (results / file).is_file()
    ]
    if not lines:
        return []
    about = f"By the Dice of `{picked_by(scores)}` with seed {scores.seeds[0]}:"
    return ["### Pictures", f"{about}\n\n" + "\n".join(lines)]


def _seeds_table(rows: Sequence[Row]) -> str:
    """Precision and recall of the seeds of each of our methods, by training."""
    seeds = values_of(rows, "seed")
    lines = [
        [method, *(seed_quality(select(rows, method=method, seed=seed)) for seed in seeds)]
        for method in values_of(rows, "method")
    ]
    about = "Precision and recall of object seeds on training slices: diagnostics that see masks."
    header = ["method", *(f"seed {seed}" for seed in seeds)]
    return f"{about}\n\n{Table(header, lines).markdown()}"


def _weak_table(rows: Sequence[Row]) -> str:
    """Rank correlation of the agreement with slice labels and strict Dice, by training."""
    lines = []
    for seed in values_of(rows, "seed"):
        pairs = [
            (float(row["area_auroc"]), float(row["dice"]))
            for row in select(rows, seed=seed)
            if row["area_auroc"] and row["dice"] and not method_named(row["method"]).saw_masks
        ]
        lines.append([seed, format_number(rank_correlation(pairs), signed=True), str(len(pairs))])
    about = (
        "Spearman's rank correlation, over the methods that used no mask, between the AUROC of a "
        "slice's area above the threshold for its label (validation patients) and strict Dice "
        "(test patients)."
    )
    return f"{about}\n\n{Table(['seed', 'rank correlation', 'methods'], lines).markdown()}"


def _slice_protocol_table(rows: Sequence[Row]) -> str:
    digits = {"dice": 3, "iou": 3, "hd95_pixels": 1, "hd95_contour_pixels": 1}
    lines = [
        [
            method,
            *(
                format_number(column_mean(select(rows, method=method, components=kept), m), places)
                for kept in COMPONENTS
                for m, places in digits.items()
            ),
        ]
        for method in values_of(rows, "method")
    ]
    header = ["Dice", "IoU", "HD95 px", "HD95 px (contours)"]
    largest = [f"{name}, largest component" for name in header]
    about = (
        "Not comparable with the strict scores: slices with the object alone, Otsu's threshold "
        "within each, mean over slices and then over seeds."
    )
    return f"{about}\n\n{Table(['method', *header, *largest], lines).markdown()}"


def _mean_cell(scores: Scores, exists: Sequence[bool], digits: int = 3) -> Cell:
    interval = format_interval(mean_of_trainings(scores), *crossed_interval(scores), digits)
    return _of_trainings(interval, exists)


def _of_trainings(cell: Cell, exists: Sequence[bool]) -> Cell:
    """The cell; without its interval where some trainings left the method out, since the mean over
    the others says nothing about those."""
    if all(exists):
        return cell
    return Cell(cell.value, f"({sum(exists)} of {len(exists)} trainings)")


def _counts(numbers: Sequence[int | None]) -> str:
    return ", ".join("-" if number is None else str(number) for number in numbers)


def _fractions(counts: Sequence[int], row: PairedDifference) -> str:
    """Numbers of patients out of those compared, for each training."""
    return ", ".join(f"{count}/{whole}" for count, whole in zip(counts, row.num_compared))


def _float(text: str) -> float | None:
    return float(text) if text else None
