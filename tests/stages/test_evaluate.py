"""Evaluation of a run whose every number is known by hand."""

import csv
import json
import re
from math import hypot

import numpy as np
import pytest
from finished_run import ALARM, CLEAN, CUT, FOUND, MISSED, SEEDS, UNSCORED, make_run, settings

from cldf_dist.method.metrics import score_case
from cldf_dist.method.threshold import OracleSearch, candidate_thresholds
from cldf_dist.methods import SUPERVISED
from cldf_dist.runs.run import Run
from cldf_dist.scoring.slice_protocol import slice_protocol_summary
from cldf_dist.scoring.tables import results_table, slice_protocol_table
from cldf_dist.stages import evaluate, report

DIAGONAL_MM = hypot(16, 16, 12)
BASELINES = ("gradcam", "gradient_map", "cdm")


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    config = settings(tmp_path_factory.mktemp("runs"))
    make_run(config)
    run = Run(config, "evaluate", ())
    run.open()
    run.finish(evaluate.execute(config, run))
    return config.run_folder / "evaluate"


@pytest.fixture(scope="module")
def summary(evaluated):
    return json.loads((evaluated / "summary.json").read_text())


@pytest.fixture(scope="module")
def strict(summary):
    return summary["strict"]


def slices_of(evaluated):
    with (evaluated / "cases.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("rule", ["methods", "methods_otsu"])
def test_found_missed_and_false_alarm_enter_the_means_and_true_negatives_do_not(strict, rule):
    row = strict[rule]["cldf"]
    assert row["dice"]["mean"] == pytest.approx(5 / 7)
    assert row["iou"]["mean"] == pytest.approx(5 / 7)
    assert row["hd95_mm"]["mean"] == pytest.approx(2 * DIAGONAL_MM / 7)
    assert row["dice"]["num_patients"] == 7
    assert row["dice"]["low"] < 5 / 7 < row["dice"]["high"]
    assert (row["misses"], row["false_alarms"]) == (1, 1)
    assert row["specificity"] == {
        "specificity": 0.5,
        "num_true_negatives": 1,
        "num_empty_truth": 2,
    }


def test_half_found_object_scores_two_thirds(strict):
    # 16 of 32 voxels: Dice 2 * 16 / 48, IoU 16 / 32
    row = strict["methods"]["gradcam"]
    assert row["dice"]["mean"] == pytest.approx(5 * (2 / 3) / 6)
    assert row["iou"]["mean"] == pytest.approx(5 * (1 / 2) / 6)
    assert row["specificity"]["specificity"] == 1.0


def test_a_method_that_finds_nothing_misses_every_object(strict):
    row = strict["methods"]["cdm"]
    assert (row["dice"]["mean"], row["misses"], row["false_alarms"]) == (0.0, 6, 0)


def test_patients_are_counted_with_those_that_cannot_be_scored(strict):
    assert strict["num_test_patients"] == 8
    assert strict["num_without_object"] == 2
    assert strict["num_without_truth"] == 1
    assert "1 %" in strict["headline_rule"]


def test_comparison_pairs_patients_and_says_how_many_it_drops(strict):
    row = strict["comparisons"]["gradcam"]
    assert row["difference"] == pytest.approx(5 * (1 / 3) / 6)
    assert (row["num_patients"], row["num_dropped"]) == (6, 2)
    # six differences, one of them 0: 2 x 2 of 64 sign patterns are as extreme
    assert row["p"] == pytest.approx(4 / 64)


def test_holm_family_holds_the_baselines_only(strict):
    for method in BASELINES:
        assert strict["comparisons"][method]["p_holm"] == pytest.approx(3 * 4 / 64)
    assert "cldf" not in strict["comparisons"]


def test_supervised_reference_gets_a_difference_but_no_test(strict):
    row = strict["comparisons"][SUPERVISED]
    assert (row["p"], row["p_holm"]) == (None, None)
    assert row["difference"] == pytest.approx(0.0)
    assert row["low"] == row["high"] == 0.0


def test_oracle_is_apart_and_never_below_the_headline(strict):
    assert set(strict["oracle_threshold"]) == set(strict["methods"])
    for method, oracle in strict["oracle_threshold"].items():
        assert oracle["dice"] >= strict["methods"][method]["dice"]["mean"] - 1e-9
    assert strict["oracle_threshold"]["cldf"]["dice"] == pytest.approx(5 / 7)
    # CDM says nothing: the oracle can do no better than to take the whole open slices
    everything = 2 * 32 / (2 * 14 * 14 + 32)
    assert strict["oracle_threshold"]["cdm"]["dice"] == pytest.approx(5 * everything / 7)


def test_slice_labels_of_validation_patients_judge_each_method_without_a_mask(summary, strict):
    weak = summary["weak_validation"]
    assert list(weak) == list(strict["methods"])
    # one of the six slices has too little of the object to count; CDM marks nothing anywhere
    assert weak["cldf"] == {"area_auroc": 1.0, "false_area": 0.0, "num_slices": 5}
    assert weak["cdm"]["area_auroc"] == 0.5
    assert "Without any mask" in results_table(summary)


def test_oracle_search_equals_scoring_every_threshold():
    rng = np.random.default_rng(0)
    thresholds = np.arange(-1, 18, dtype=np.float32) / 16
    search = OracleSearch(thresholds)
    dice_of_patients = []
    for share in (0.3, 0.05, 0.0):  # the last has no object
        truth = rng.random((6, 5, 4)) < share
        scores = rng.random(truth.shape) * 0.6 + 0.4 * truth
        scores = (np.round(16 * scores) / 16).astype(np.float32)  # many lie exactly at a threshold
        allowed = rng.random(truth.shape) < 0.8
        search.add(scores[allowed], truth[allowed], int(truth.sum()))
        cases = [
            score_case((scores > threshold) & allowed, truth, (1, 1, 1)) for threshold in thresholds
        ]
        dice_of_patients.append([np.nan if c.dice is None else c.dice for c in cases])
    mean = np.nanmean(dice_of_patients, axis=0)
    best = search.best()
    assert best["dice"] == pytest.approx(mean.max())
    assert best["threshold"] == thresholds[mean.argmax()]


def test_oracle_without_any_object_or_mask_is_undefined():
    search = OracleSearch(np.array([0.5], np.float32))
    search.add(np.zeros(3, np.float32), np.zeros(3, bool), 0)
    assert search.best() == {"threshold": None, "dice": None}


@pytest.mark.parametrize("block", ["methods", "methods_largest_component"])
def test_slice_protocol_counts_positive_slices_only_and_asks_no_gate(summary, strict, block):
    """Two slices with the object of each of the six patients that have it. Neither the false alarm
    nor the gate that closes on one patient counts, so CLDF finds everything."""
    rows = summary["slice_protocol"][block]
    assert list(rows) == list(strict["methods"])
    assert {row["num_slices"] for row in rows.values()} == {2 * (len(FOUND) + 1)}
    assert rows["cldf"]["dice"] == {"mean": 1.0, "std": 0.0}
    # 8 of 16 pixels; four of the 24 of both masks lie 2 apart, and 4 of the 20 on the contours
    half = rows["gradcam"]
    assert half["dice"]["mean"] == pytest.approx(2 / 3, abs=1e-6)
    assert half["iou"]["mean"] == pytest.approx(1 / 2, abs=1e-6)
    assert half["hd95_pixels"]["mean"] == half["hd95_contour_pixels"]["mean"] == 2.0
    # CDM says nothing: the worst Dice, the best distance
    nothing = rows["cdm"]
    assert nothing["dice"]["mean"] == pytest.approx(0, abs=1e-6)
    assert nothing["hd95_pixels"] == nothing["hd95_contour_pixels"] == {"mean": 0.0, "std": 0.0}
    assert "at least one object pixel" in summary["slice_protocol"]["rule"]


def test_slice_protocol_means_can_be_computed_again_from_its_slices(evaluated, summary):
    with (evaluated / "slice_protocol.csv").open() as file:
        rows = list(csv.DictReader(file))
    methods = list(summary["slice_protocol"]["methods"])
    assert len(rows) == 2 * (len(FOUND) + 1) * len(methods)
    assert {row["slice"] for row in rows} == {"2", "3"}
    assert {row["patient"] for row in rows} == {*FOUND, MISSED}
    for suffix, block in (("", "methods"), ("_largest_component", "methods_largest_component")):
        for method, means in summary["slice_protocol"][block].items():
            for metric in ("dice", "iou", "hd95_pixels", "hd95_contour_pixels"):
                values = [float(r[metric + suffix]) for r in rows if r["method"] == method]
                assert np.mean(values) == pytest.approx(means[metric]["mean"])
                assert np.std(values) == pytest.approx(means[metric]["std"])


def test_slice_protocol_table_stands_apart_from_the_strict_one(evaluated, summary):
    table = (evaluated / "slice_protocol.txt").read_text()
    assert table == slice_protocol_table(summary)
    assert "not comparable with" in table
    assert re.search(r"^cldf +1\.000 ± 0\.000 .* 12$", table, re.MULTILINE)
    assert table.count("supervised_decoder *") == 2
    assert "saw the training masks" in table
    assert "lice protocol" not in (evaluated / "table.txt").read_text()


def test_without_a_slice_with_the_object_the_slice_protocol_table_is_empty():
    text = slice_protocol_table({"slice_protocol": slice_protocol_summary([], ["cldf"])})
    assert re.search(r"^cldf +- +- +- +- +0$", text, re.MULTILINE)


def test_gate_is_judged_on_labelled_slices_of_both_splits(summary):
    # test: 8 labelled patients x 6 slices; the missed object's 2 and the alarm's 2 are wrong
    test = summary["gate"]["test"]
    assert test["num_slices"] == 48
    assert test["slice_accuracy"] == pytest.approx(44 / 48)
    assert test["slice_auroc"] == pytest.approx((10 * 36 + 2 * 34 / 2) / (12 * 36))
    # the slice with one object pixel is neither positive nor negative
    assert summary["gate"]["validation"] == {
        "slice_accuracy": 1.0,
        "slice_auroc": 1.0,
        "num_slices": 5,
    }


def test_seed_quality_is_taken_over_from_the_cache(summary):
    assert summary["seeds"] == SEEDS


def test_cases_hold_one_row_per_patient_method_and_rule(evaluated):
    rows = slices_of(evaluated)
    assert len(rows) == 8 * 5 * 2 + 8
    assert {row["method"] for row in rows if row["rule"] == "oracle"} == {"oracle_intensity"}
    keys = {(row["patient"], row["method"], row["rule"]) for row in rows}
    assert len(keys) == len(rows)
    assert not any(row["patient"] == UNSCORED for row in rows)
    ours = {r["patient"]: r for r in rows if (r["method"], r["rule"]) == ("cldf", "headline")}
    assert float(ours[FOUND[0]]["dice"]) == 1.0
    assert float(ours[FOUND[1]]["dice"]) == 1.0  # stored in another orientation
    assert float(ours[FOUND[0]]["truth_ml"]) == pytest.approx(0.064)
    assert ours[MISSED]["outcome"] == "miss"
    assert (ours[ALARM]["outcome"], ours[ALARM]["dice"]) == ("false_alarm", "0.0")
    assert (ours[CLEAN]["outcome"], ours[CLEAN]["dice"]) == ("true_negative", "")


def test_table_marks_what_used_the_masks(evaluated, summary):
    table = (evaluated / "table.txt").read_text()
    assert table == results_table(summary)
    assert "supervised_decoder *" in table
    assert "saw the training masks" in table
    assert "chosen WITH the test masks" in table
    assert "oracle_intensity †" in table
    assert "0.714 [" in table
    assert "0.50 (1/2)" in table
    assert "+0.278 [" in table


def test_summary_is_strict_json(evaluated):
    def refuse(constant):
        raise AssertionError(constant)

    json.loads((evaluated / "summary.json").read_text(), parse_constant=refuse)


def test_what_is_written_is_what_is_scored(tmp_path):
    """A mask file that disagrees with the scores decides."""
    from cldf_dist.data.formats.nifti import write_nifti

    config = settings(tmp_path)
    make_run(config)
    path = config.run_folder / "segment" / "masks" / "cldf" / f"{FOUND[0]}.nii.gz"
    write_nifti(path, np.zeros((16, 16, 6), np.uint8), np.diag([-1.0, -1, 2, 1]))
    run = Run(config, "evaluate", ())
    run.open()
    numbers = evaluate.execute(config, run)
    run.close()
    assert numbers["dice"]["cldf"] == pytest.approx(4 / 7)
    rows = slices_of(config.run_folder / "evaluate")
    found = {
        r["rule"]: r["outcome"] for r in rows if (r["patient"], r["method"]) == (FOUND[0], "cldf")
    }
    assert found == {"headline": "miss", "otsu": "overlap"}


def test_without_any_truth_mask_the_slice_labels_alone_are_scored(tmp_path, capsys):
    config = settings(tmp_path)
    make_run(config, with_truth=False)
    run = Run(config, "evaluate", ())
    run.open()
    numbers = evaluate.execute(config, run)
    run.finish(numbers)
    assert numbers == {"num_test_patients": 0, "dice": {}}
    assert "no test patient has a truth mask in" in capsys.readouterr().err
    summary = json.loads((run.folder / "summary.json").read_text())
    assert summary["strict"]["methods"] == summary["strict"]["comparisons"] == {}
    assert summary["strict"]["num_without_truth"] == 9
    assert summary["gate"]["validation"]["num_slices"] > 0
    table = (run.folder / "table.txt").read_text()
    assert "None of the 9 test patients has a truth mask" in table
    assert "AUROC" in table
    assert "Strict protocol" not in table
    page = Run(config, "report", ())
    page.open()
    report.execute(config, page)
    page.close()
    html = (page.folder / "report.html").read_text()
    assert "None of the 9 test patients has a truth mask" in html
    assert "Strict protocol" not in html


def test_without_segment_it_names_the_command(tmp_path):
    config = settings(tmp_path)
    with pytest.raises(FileNotFoundError, match="cldf prepare"):
        evaluate.execute(config, Run(config, "evaluate", ()))


def test_headline_threshold_is_among_those_the_oracle_tries():
    scores = [np.linspace(0, 1, 50, dtype=np.float32)]
    assert np.float32(CUT + 0.003) in candidate_thresholds(scores, CUT + 0.003)
    assert candidate_thresholds([], CUT).tolist() == [CUT]
