"""Pictures of the best, the median and the worst patient: each method's mask side by side."""

from __future__ import annotations

from pathlib import Path

from cldf_dist.config import Config
from cldf_dist.data.shards.remote import ShardCache
from cldf_dist.data.shards.table import ShardSet
from cldf_dist.runs.run import read_json
from cldf_dist.scoring.figures import write_comparison
from cldf_dist.scoring.mask_files import mask_path, read_mask, truth_path
from cldf_dist.study.rows import read_rows
from cldf_dist.study.scores import StrictScores, picked_patients


def draw_patients(experiment: str, config: Config, results: Path) -> list[Path]:
    """Draw `<experiment>_best.png` and so on into `results` from a finished run; the files."""
    prepare, segment = config.run_folder / "prepare", config.run_folder / "segment"
    rows = read_rows(config.run_folder / "evaluate" / "cases.csv")
    scores = StrictScores.of([{**row, "seed": ""} for row in rows])  # of a single training
    shards = ShardSet(prepare, on_damaged=config.data.on_damaged, cache=ShardCache.of(config.data))
    methods = list(read_json(segment / "thresholds.json")["thresholds"])
    written = []
    for which, (patient, _) in picked_patients(scores).items():
        masks = {method: read_mask(mask_path(segment, method, patient)) for method in methods}
        path = results / f"{experiment}_{which}.png"
        write_comparison(
            path,
            masks,
            read_mask(truth_path(prepare, patient)),
            shards.geometry(patient),
            shards.split("test"),
        )
        written.append(path)
    return written
