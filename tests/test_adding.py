"""docs/adding.md's recipe for a baseline is complete: one record, one function, nothing else."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
NAME, TITLE = "first_channel", "first channel"


def recipe() -> tuple[str, str]:
    """The record and the function of the page."""
    page = (ROOT / "docs" / "adding.md").read_text().split("## A baseline")[1]
    record, function = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)[:2]
    return record, function


@pytest.mark.slow
def test_a_baseline_is_one_record_and_one_function(tmp_path: Path) -> None:
    """Added to a copy of the package, it is in the table, the report and the study."""
    record, function = recipe()
    package = tmp_path / "cldf_dist"
    shutil.copytree(ROOT / "cldf_dist", package, ignore=shutil.ignore_patterns("__pycache__"))
    methods, scores = package / "methods.py", package / "inference" / "score_maps.py"
    text = methods.read_text()
    assert text.count("METHODS = (\n") == 1
    methods.write_text(text.replace("METHODS = (\n", f"METHODS = (\n    {record.strip()},\n"))
    with scores.open("a") as file:
        file.write(f"\n\n{function}")
    study = {
        "runs": str(tmp_path / "runs"),
        "results": str(tmp_path / "results"),
        "seeds": [0],
        "experiments": {
            "tiny": {
                "configs": [str(ROOT / "configs" / "debug.yaml")],
                "settings": ["tracking.enabled=false"],
            }
        },
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    places = os.pathsep.join([str(tmp_path), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, "-m", "cldf_dist", "study", "study.yaml"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": places, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    run = tmp_path / "runs" / "tiny" / "base" / "seed0"
    summary = json.loads((run / "evaluate" / "summary.json").read_text())
    assert summary["strict"]["methods"][NAME]["dice"]["mean"] is not None
    assert NAME in summary["strict"]["comparisons"], "it is in the tested family"
    assert NAME in (run / "evaluate" / "table.txt").read_text()
    assert TITLE in (run / "report" / "report.html").read_text()
    assert (run / "segment" / "masks" / NAME).is_dir()
    assert NAME in (tmp_path / "results" / "tables.md").read_text()
