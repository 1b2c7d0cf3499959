"""tables.md from CSV files whose every number is known by hand."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from cldf_dist.methods import marked, method_named
from cldf_dist.study.rows import merge_rows, read_rows
from cldf_dist.study.scores import StrictScores, picked_patients
from cldf_dist.study.tables import rank_correlation, write_tables

# Dice of the patients a, b and c; None is a true negative
DICE = {
    ("0", "base", "gradcam"): (0.2, 0.4, None),
    ("1", "base", "gradcam"): (0.4, 0.4, None),
    ("0", "base", "cldf"): (0.4, 0.6, None),
    ("1", "base", "cldf"): (0.6, 0.2, 0.0),
    ("0", "base", "cldf_plus"): (0.6, 0.8, None),
    ("1", "base", "cldf_plus"): (0.6, 0.8, None),
    ("0", "base", "supervised_decoder"): (0.9, 0.9, None),
    ("1", "base", "supervised_decoder"): (0.7, 0.9, None),
    ("0", "warm", "cldf"): (0.5, 0.9, None),
}


def case(patient: str, method: str, dice: float | None, rule: str = "headline") -> dict[str, str]:
    value = "" if dice is None else str(dice)
    outcome = "true_negative" if dice is None else "overlap"
    if (patient, dice) == ("c", 0.0):
        outcome = "false_alarm"
    metrics = {"dice": value, "iou": value, "hd95_mm": value}
    return {"patient": patient, "method": method, "rule": rule, **metrics, "outcome": outcome}


@pytest.fixture
def results(tmp_path: Path) -> Path:
    for seed, variant in dict.fromkeys((seed, variant) for seed, variant, _ in DICE):
        key = {"experiment": "phantom", "seed": seed, "variant": variant}
        rows = []
        for (s, v, method), dice in DICE.items():
            if (s, v) == (seed, variant):
                rows += [{**key, **case(p, method, d)} for p, d in zip("abc", dice)]
                rows.append({**key, **case("a", method, 0.99, rule="otsu")})
        rows += [{**key, **case(p, "oracle_intensity", 0.3, rule="oracle")} for p in "ab"]
        merge_rows(tmp_path / "cases.csv", key, rows)
        recall = "0.5" if variant == "base" else "1"
        quality = {"method": "cldf", "object_precision": "0.75", "object_recall": recall}
        merge_rows(tmp_path / "seeds.csv", key, [{**key, **quality}])
        weak = {"gradcam": "0.6", "cldf": "0.7", "cldf_plus": "0.9", "supervised_decoder": "0.1"}
        merge_rows(
            tmp_path / "weak_validation.csv",
            key,
            [
                {**key, "method": method, "area_auroc": auroc, "dice": dice}
                for (method, auroc), dice in zip(weak.items(), ("0.3", "0.5", "0.7", "0.9"))
            ],
        )
    return tmp_path


def cells(text: str, heading: str) -> dict[str, dict[str, str]]:
    """The rows of the table below a heading, by their first cell."""
    section = text.split(f"### {heading}\n")[1].split("\n#")[0]
    lines = [line.strip("| ").split(" | ") for line in section.splitlines() if "|" in line]
    header = lines[0]
    return {line[0]: dict(zip(header, line)) for line in lines[2:]}


def test_each_seed_and_the_mean_over_seeds_are_in_the_strict_table(results: Path) -> None:
    table = cells(write_tables(results).read_text(), "Strict scores")
    assert list(table) == [
        "gradcam", "cldf", "cldf_plus", "supervised_decoder *", "oracle_intensity †",
    ]  # fmt: skip
    ours = table["cldf"]
    # seed 0: (0.4 + 0.6) / 2; seed 1: (0.6 + 0.2 + 0) / 3, with a false alarm
    assert (ours["seed 0"], ours["seed 1"]) == ("0.500", "0.267")
    assert re.fullmatch(r"0\.383 \[0\.\d+, 0\.\d+\]", ours["Dice [95 %]"])
    assert ours["false alarms"] == "0, 1"
    assert ours["misses"] == "0, 0"
    assert table["oracle_intensity †"]["seed 1"] == "0.300"


def test_each_of_our_methods_is_compared_with_each_other_method(results: Path) -> None:
    text = write_tables(results).read_text()
    plus = cells(text, "cldf_plus minus the other methods")
    # a: 0.4 and 0.2, b: 0.4 and 0.4 in the two trainings
    gradcam = plus["gradcam"]
    assert gradcam["Dice [95 %]"] == "+0.350 [+0.200, +0.400]"
    assert gradcam["each seed"] == "+0.400, +0.300"
    assert (gradcam["p"], gradcam["p (Holm)"]) == ("0.5000", "1.0000"), "1 of 2 patterns"
    assert (gradcam["better"], gradcam["worse"], gradcam["patients"]) == (
        "2/2, 2/2",
        "0/2, 0/2",
        "2",
    )
    assert (plus["cldf"]["better"], plus["cldf"]["p (Holm)"]) == ("2/2, 1/2", "1.0000")
    assert plus["supervised_decoder *"]["p"] == plus["oracle_intensity †"]["p"] == "-"
    assert plus["supervised_decoder *"]["Dice [95 %]"].startswith("-0.150")
    assert set(cells(text, "cldf minus the other methods")) >= {"gradcam", "cldf_plus"}


def test_a_method_that_a_training_left_out_is_compared_with_no_claim(results: Path) -> None:
    """It is left out where it would do badly, so its mean over the others would flatter it."""
    path = results / "cases.csv"
    kept = [r for r in read_rows(path) if (r["method"], r["seed"]) != ("cldf_plus", "1")]
    for seed in ("0", "1"):
        key = {"experiment": "phantom", "seed": seed, "variant": "base"}
        merge_rows(path, key, [row for row in kept if key.items() <= row.items()])
    text = write_tables(results).read_text()
    strict = cells(text, "Strict scores")["cldf_plus"]
    assert (strict["seed 0"], strict["seed 1"]) == ("0.700", "-")
    assert strict["Dice [95 %]"] == "0.700 (1 of 2 trainings)"
    assert (strict["misses"], strict["false alarms"]) == ("0, -", "0, -")
    plus = cells(text, "cldf_plus minus the other methods")["gradcam"]
    assert plus["Dice [95 %]"] == "+0.400 (1 of 2 trainings)"
    assert (plus["p"], plus["p (Holm)"]) == ("-", "-")
    assert cells(text, "cldf minus the other methods")["cldf_plus"]["p"] == "-"


def test_without_any_truth_mask_the_tables_say_so(results: Path) -> None:
    (results / "cases.csv").write_text("experiment,seed,variant\n")
    about = {"commit": "abc", "torch": "2", "device": "CPU", "processes": "1", "seconds": "3"}
    key = {"experiment": "phantom", "seed": "0", "variant": "base"}
    merge_rows(results / "provenance.csv", key, [{**key, **about}])
    text = write_tables(results).read_text()
    assert "No test patient has a truth mask: no mask is scored." in text
    assert "Commit abc" in text


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        ("cases", lambda text: text[: len(text) // 2], "the last line is cut off"),
        ("cases", lambda text: "<<<<<<< HEAD\n" + text, "there is no column experiment"),
        (
            "cases",
            lambda text: text.replace("\n", "\n<<<<<<< HEAD\n", 1),
            "line 2 has not the cells",
        ),
        ("cases", lambda text: text.split("\n", 1)[1], "there is no column"),
        ("seeds", lambda text: text.replace("object_recall", "recall"), "no column object_recall"),
        ("seeds", lambda text: text.replace("phantom,0", "phantom,x"), "seed must be a number"),
    ],
)
def test_a_damaged_file_of_results_is_named(
    results: Path, name: str, damage: Callable[[str], str], said: str
) -> None:
    path = results / f"{name}.csv"
    path.write_text(damage(path.read_text()))
    with pytest.raises(ValueError, match=f"{name}.csv is damaged: .*{said}.*; restore it, or"):
        write_tables(results)


def test_a_file_of_results_that_is_no_text_is_named(results: Path) -> None:
    (results / "slice_protocol.csv").write_bytes(b"\xff\xfe\n")
    with pytest.raises(ValueError, match=r"slice_protocol\.csv is damaged: .*decode"):
        write_tables(results)


def test_a_variant_is_compared_with_the_base_of_its_seed(results: Path) -> None:
    table = cells(write_tables(results).read_text(), "Ablations")
    base, warm = table["base"], table["warm"]
    assert base["seeds"] == warm["seeds"] == "0"
    assert (base["Dice of cldf"], warm["Dice of cldf"]) == ("0.500", "0.700")
    assert warm["cldf minus base [95 %]"] == "+0.200 [+0.100, +0.300]"
    assert (warm["Dice of cldf_plus"], warm["cldf_plus minus base [95 %]"]) == ("-", "-")
    quality = [row["cldf: seed precision, recall"] for row in (base, warm)]
    assert quality == ["0.750, 0.500", "0.750, 1.000"]
    assert base["cldf_plus: seed precision, recall"] == "-, -"


def test_a_baseline_that_a_variant_scores_has_a_column(results: Path) -> None:
    key = {"experiment": "phantom", "seed": "0", "variant": "warm"}
    scored = [case("a", "cldf", 0.5), case("a", "cdm", 0.25)]
    merge_rows(results / "cases.csv", key, [{**key, **row} for row in scored])
    table = cells(write_tables(results).read_text(), "Ablations")
    assert (table["base"]["Dice of cdm"], table["warm"]["Dice of cdm"]) == ("-", "0.250")
    assert "Dice of gradcam" not in table["base"], "scored by the base alone"


def test_the_seeds_of_each_training_are_in_a_table(results: Path) -> None:
    table = cells(write_tables(results).read_text(), "Seeds")
    assert table["cldf"]["seed 0"] == "0.750, 0.500"


def test_methods_that_saw_masks_are_left_out_of_the_rank_correlation(results: Path) -> None:
    table = cells(write_tables(results).read_text(), "Without any mask")
    assert table["0"] == {"seed": "0", "rank correlation": "+1.000", "methods": "3"}
    assert rank_correlation([(1, 3), (2, 2), (3, 1)]) == pytest.approx(-1)
    assert rank_correlation([(1, 3), (2, 2)]) is None
    assert rank_correlation([(1, 3), (1, 2), (1, 1)]) is None


def test_equal_keys_are_replaced_and_new_columns_kept(tmp_path: Path) -> None:
    path = tmp_path / "numbers.csv"
    keys = [{"experiment": "a", "seed": seed, "variant": "base"} for seed in ("10", "2")]
    for key in keys:
        merge_rows(path, key, [{**key, "method": m, "dice": "0.1"} for m in ("x", "y")])
    merge_rows(path, keys[0], [{**keys[0], "method": "x", "dice": "0.5", "iou": "0.3"}])
    rows = read_rows(path)
    assert [(row["seed"], row["method"], row["dice"]) for row in rows] == [
        ("2", "x", "0.1"), ("2", "y", "0.1"), ("10", "x", "0.5"),
    ]  # fmt: skip
    assert [row["iou"] for row in rows] == ["", "", "0.3"]
    before = path.read_bytes()
    merge_rows(path, keys[0], rows[2:])
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_run_that_is_read_again_keeps_its_place(results: Path) -> None:
    """In every order of repeats; the columns and the rows of the others stay too."""
    before = {path.name: path.read_bytes() for path in results.glob("*.csv")}
    for name in before:
        for variant in ("base", "warm", "base"):
            key = {"experiment": "phantom", "seed": "0", "variant": variant}
            rows = [row for row in read_rows(results / name) if key.items() <= row.items()]
            assert rows
            merge_rows(results / name, key, rows)
        assert (results / name).read_bytes() == before[name]


def test_best_median_and_worst_patient_are_those_of_the_best_of_our_methods() -> None:
    key = {"experiment": "e", "seed": "0", "variant": "base"}
    dice = {"a": 0.9, "b": 0.1, "c": None, "d": 0.5, "e": 0.6}
    rows = [{**key, **case(patient, "cldf", value)} for patient, value in dice.items()]
    scores = StrictScores.of(rows)
    assert picked_patients(scores) == {
        "best": ("a", 0.9),
        "median": ("d", 0.5),
        "worst": ("b", 0.1),
    }
    plus = [{**row, "method": "cldf_plus", "dice": "0.7"} for row in rows[:1]]
    assert picked_patients(StrictScores.of([*rows, *plus]))["worst"] == ("a", 0.7)
    assert picked_patients(StrictScores.of(rows[2:3])) == {}


def test_marks() -> None:
    assert [marked(m) for m in ("cldf", "supervised_decoder", "oracle_intensity")] == [
        "cldf", "supervised_decoder *", "oracle_intensity †",
    ]  # fmt: skip
    assert not method_named("raw_patches").saw_masks


def test_without_results_there_are_no_tables(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no rows of a study; run: cldf study"):
        write_tables(tmp_path)
