"""The lower bound of one threshold on one channel, in a run where one channel shows the object."""

import csv
import json

import finished_run
import numpy as np
import pytest
from finished_run import ALARM, FOUND, MISSED, make_run, settings

from cldf_dist.data.formats.nifti import Volume
from cldf_dist.runs.run import Run
from cldf_dist.stages import evaluate

SHOWN_IN = 2  # of the channels flair, t1, t1ce, t2


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """In channel t1ce the object is darker than anything else; the others are noise."""
    plain = finished_run.volume

    def shown(name: str) -> Volume:
        scan = plain(name)
        image = 500 + scan.image // 2
        if scan.mask is not None:
            image[SHOWN_IN][scan.mask] = 1
        return Volume(name, image, scan.body_mask, scan.mask, scan.affine)

    config = settings(tmp_path_factory.mktemp("runs"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finished_run, "volume", shown)
        make_run(config)
    run = Run(config, "evaluate", ())
    run.open()
    run.finish(evaluate.execute(config, run))
    return run.folder


def test_the_channel_and_the_side_that_show_the_object_are_found(evaluated):
    found = json.loads((evaluated / "summary.json").read_text())["strict"]["oracle_intensity"]
    assert (found["channel"], found["above"]) == ("t1ce", False)
    assert found["dice"] == pytest.approx(5 / 6), "the gate closes the slices of one patient"
    assert found["ungated"]["dice"] == pytest.approx(1.0)
    assert (found["ungated"]["channel"], found["ungated"]["above"]) == ("t1ce", False)
    assert (
        f"t1ce below {found['threshold']:.3f}, Dice 0.833" in (evaluated / "table.txt").read_text()
    )


def test_its_patients_are_scored_as_those_of_other_rows(evaluated):
    with (evaluated / "cases.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["method"] == "oracle_intensity"]
    assert {row["rule"] for row in rows} == {"oracle"}
    by_patient = {row["patient"]: row for row in rows}
    assert [by_patient[name]["dice"] for name in FOUND] == ["1.0"] * 5
    assert by_patient[MISSED]["outcome"] == "miss"
    assert by_patient[ALARM]["outcome"] == "true_negative"
    dice = [float(row["dice"]) for row in rows if row["dice"]]
    found = json.loads((evaluated / "summary.json").read_text())["strict"]["oracle_intensity"]
    assert np.mean(dice) == pytest.approx(found["dice"])
