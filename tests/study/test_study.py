"""Studies: what is asked for, what finished runs share, and runs in processes of their own."""

import csv
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from cldf_dist.__main__ import main
from cldf_dist.config import load
from cldf_dist.methods import METHODS
from cldf_dist.stages import STAGES
from cldf_dist.study.child import Child, wait_for_others
from cldf_dist.study.command import STOPPED, study_lock
from cldf_dist.study.plan import planned_runs, read_study
from cldf_dist.study.sharing import share_finished_stages
from cldf_dist.system.locks import FolderLock

ROOT = Path(__file__).resolve().parents[2]
DEBUG = str(ROOT / "configs" / "debug.yaml")
QUIET = "tracking.enabled=false"
TRAININGS = (
    "train-diffusion",
    "tune-label-embedding",
    "train-classifier",
    "train-cam",
    "train-patch-classifier",
)


def write_study(folder: Path, **changes: Any) -> str:
    """A study of the debug configuration in a folder of its own."""
    study = {
        "runs": str(folder / "runs"),
        "results": str(folder / "results"),
        "seeds": [0],
        "experiments": {"phantom": {"configs": [DEBUG], "settings": [QUIET]}},
        **changes,
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(study))
    return str(path)


def copy_stages(debug_run: Any, folder: Path, *stages: str) -> Path:
    """The run of seed 0, with these stages finished before."""
    run = folder / "runs" / "phantom" / "base" / "seed0"
    for stage in stages:
        shutil.copytree(debug_run.folder / stage, run / stage)
    return run


def test_the_ready_study_plans_every_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BRATS", str(ROOT))
    study, _ = read_study(str(ROOT / "configs" / "study.yaml"), [])
    runs = planned_runs(study, ROOT / "configs", ["diffusion.fit.steps=4"])
    names = [run.name for run in runs]
    assert len(set(names)) == len(names)
    assert names[:3] == ["phantom/base/seed0", "brats2021/base/seed0", "phantom/base/seed1"]
    assert all(run.config.diffusion.fit.steps == 4 for run in runs)
    variants = [run for run in runs if run.variant != "base"]
    assert len(variants) >= 12
    base = runs[0].config
    for run in variants:
        baselines = {
            "without_label_tuning": {"cdm", "cg_diff", "cg_cdm"},
            "counterfactuals_at_published_scales": {"cg_diff", "cg_cdm"},
        }
        further = set(run.config.segment.methods) - {
            method.name for method in METHODS if method.in_variants
        }
        assert further == baselines.get(run.variant, set())
        assert not base.segment.methods
    brats = runs[1].config.data
    assert (brats.root, brats.splits) == (str(ROOT), str(ROOT / "configs/brats_24_splits.json"))
    monkeypatch.delenv("BRATS")
    assert load([str(ROOT / "configs" / "demo.yaml")]).data.dataset == "phantom"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": [0]}, "unknown config key seed; did you mean seeds?"),
        ({"seeds": [0, 0]}, "seeds must be different numbers >= 0"),
        ({"seeds": [True]}, "seeds[0] must be int, got True"),
        ({"experiments": {}}, "experiments must name at least one experiment"),
        ({"experiments": {"a": {"config": []}}}, "did you mean experiments.a.configs?"),
        ({"experiments": {"a/b": {"configs": [DEBUG]}}}, "plain folder names"),
        ({"experiments": {"a": {}}}, "experiments.a.configs must name at least one config file"),
        ({"experiments": ["a"]}, "experiments must hold names, each with its keys"),
        ({"ablations": {"experiments": ["b"]}}, "ablations.experiments must be of phantom"),
        ({"ablations": {"seeds": [7]}}, "ablations.seeds must be of seeds [0], got 7"),
        ({"ablations": {"variants": {"base": {}}}}, "'base' is the run without changes"),
        ({"seeds": [0, 1], "ablations": {"seeds": [1, 1]}}, "ablations.seeds must differ"),
        (
            {"experiments": {"a": {"configs": [DEBUG], "settings": ["seed=3"]}}},
            "experiments.a.settings: the study's seeds=, runs= and the names of its",
        ),
        (
            {"ablations": {"variants": {"b": {"settings": ["name=x"]}}}},
            "ablations.variants.b.settings: the study's seeds=,",
        ),
        (
            {
                "ablations": {
                    "seeds": [0],
                    "experiments": ["phantom"],
                    "variants": {"fine": {}, "typo": {"settings": ["cam.drpout=0.1"]}},
                }
            },
            "ablations.variants.typo: unknown config key cam.drpout",
        ),
        ({"experiments": {"a": {"configs": ["no.yaml"]}}}, "no config file"),
        ({"experiments": {"a": {"configs": [DEBUG], "settings": ["cam.x=1"]}}}, "cam.x"),
        (
            {"experiments": {"a": {"configs": [DEBUG], "settings": ["data.object=each"]}}},
            "data.object must be one object in a study",
        ),
    ],
)
def test_a_wrong_study_is_one_line_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], said: str
) -> None:
    assert main(["study", write_study(tmp_path, **changes)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("cldf: error: ")
    assert said in line
    assert not (tmp_path / "runs").exists()


def test_one_study_at_a_time_and_its_runs_may_make_their_trackers_tables(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in (tmp_path / "runs" / ".study", tmp_path / ".results.study"):
        held = study_lock(folder)
        FolderLock(folder.parent).release()  # the tracker's
        assert main(["study", write_study(tmp_path)]) == 1
        assert "in use by process" in (said := capsys.readouterr().err)
        assert "give this study other runs=FOLDER and results=FOLDER" in said
        held.release()


def test_words_that_a_study_would_ignore_are_refused_or_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    variants = {"seeds": [0], "experiments": ["phantom"], "variants": {"a": {}}}
    study = write_study(tmp_path, ablations=variants)
    assert main(["study", study, "seed=7", "--dry-run"]) == 1
    assert "a study gives each run its own seed; the study's seeds=" in capsys.readouterr().err
    assert main(["study", study, "ablations.seeds=[]", "--dry-run"]) == 0
    assert "no variant is planned" in capsys.readouterr().err
    runs = planned_runs(read_study(study, [])[0], tmp_path, ["segment.methods=[cldf,cdm]"])
    assert [run.config.segment.methods for run in runs] == [("cldf", "cdm")] * 2


def test_a_study_that_is_not_there_and_an_option_of_another_command_are_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["study", "no.yaml"]) == 1
    assert "no study file no.yaml" in capsys.readouterr().err
    assert main(["study", "a.yaml", "b.yaml"]) == 1
    assert "study takes one study file" in capsys.readouterr().err
    assert main(["run", DEBUG, "--tables-only"]) == 1
    assert "--tables-only is for study" in capsys.readouterr().err


def test_an_experiment_without_its_data_is_left_out_loudly(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    experiments = {
        "phantom": {"configs": [DEBUG]},
        "away": {"configs": [DEBUG], "needs": "/not/there"},
    }
    study = write_study(tmp_path, experiments=experiments, seeds=[0, 1])
    assert main(["study", study, "--dry-run"]) == 0
    said = capsys.readouterr()
    assert said.out.splitlines() == ["phantom/base/seed0: to do", "phantom/base/seed1: to do"]
    assert "the experiment away is LEFT OUT: there is no /not/there" in said.err
    assert main(["study", study, "--dry-run", f"experiments.away.needs={tmp_path}"]) == 0
    said = capsys.readouterr()
    assert "away/base/seed1: to do" in said.out
    assert "LEFT OUT" not in said.err


def test_a_run_shares_the_stages_that_its_settings_do_not_change(
    debug_run: Any, tmp_path: Path
) -> None:
    words = [QUIET, f"runs={tmp_path / 'runs'}"]
    source = load([DEBUG], [*words, "name=phantom/base/seed0"])
    copy_stages(debug_run, tmp_path, "prepare", *TRAININGS, "cache", "train-decoder")
    other = load([DEBUG], [*words, "name=other", "cam.dropout=0.3"])
    leftover = other.run_folder / ".prepare.partial"
    leftover.mkdir(parents=True)
    (leftover / "half").touch()
    assert share_finished_stages(source, other) == [
        "prepare", "train-diffusion", "tune-label-embedding", "train-classifier",
        "train-patch-classifier",
    ]  # fmt: skip
    assert not list(other.run_folder.rglob("half"))
    assert not list(other.run_folder.rglob(".lock")), "each run locks its own folders"
    for name in ("prepare/run.json", "train-diffusion/net.safetensors"):
        assert (other.run_folder / name).samefile(source.run_folder / name)
    assert share_finished_stages(source, other) == [], "a repeat takes over nothing"
    begun = load([DEBUG], [*words, "name=begun"])
    (begun.run_folder / "train-diffusion").mkdir(parents=True)
    assert share_finished_stages(source, begun) == ["prepare", *TRAININGS[2:]]
    splits = tmp_path / "splits.json"
    splits.write_text("{}")
    resplit = load([DEBUG], [*words, "name=resplit", f"data.splits={splits}"])
    assert share_finished_stages(source, resplit) == []


def test_it_waits_while_a_process_that_outlived_its_study_works(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "train-cam").mkdir()
    lock = FolderLock(tmp_path / "train-cam")
    threading.Timer(0.3, lock.release).start()
    with Child(["true"]) as child:
        assert wait_for_others(tmp_path, child)
        assert not wait_for_others(tmp_path, child)
        assert child.execute([]) == 0
    assert "train-cam is in use by process" in capsys.readouterr().err
    assert FolderLock(tmp_path / "train-cam").release() is None


@dataclass(frozen=True)
class FinishedStudy:
    """A whole study, stopped once, killed once, and started a third time to its end."""

    folder: Path
    file: str
    ends: tuple[tuple[int, str], ...]  # exit code and stderr of each start
    steps: tuple[int, int]  # of the interrupted training, logged before the second and third start


def start_study(file: str, environment: dict[str, str]) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "cldf_dist", "study", file],
        env=environment,
        text=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


@pytest.fixture(scope="module")
def finished(
    debug_run: Any, tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]
) -> FinishedStudy:
    """Seed 0 was finished before; the variant `warm` is interrupted, `broken` fails."""
    folder = tmp_path_factory.mktemp("study")
    copy_stages(debug_run, folder, *(stage.name for stage in STAGES))
    warm = [
        "decoder.contrast.temperature=0.5", "decoder.fit.steps=300", "decoder.fit.log_every=1",
        "evaluate.upper_bound=false",
    ]  # fmt: skip
    variants = {
        "warm": {"settings": warm},
        "broken": {"settings": ["decoder.fit.start_from=/not/there"]},
    }
    ablations = {"seeds": [0], "experiments": ["phantom"], "variants": variants}
    file = write_study(folder, seeds=[0, 1], ablations=ablations)
    metrics = folder / "runs" / "phantom" / "warm" / "seed0" / "train-decoder" / "metrics.jsonl"

    def wait_for_steps(count: int, process: "subprocess.Popen[str]") -> None:
        deadline = time.monotonic() + 240
        while not metrics.exists() or len(metrics.read_text().splitlines()) < count:
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                pytest.fail(process.communicate()[1])
            time.sleep(0.01)

    first = start_study(file, environment)
    wait_for_steps(10, first)
    first.terminate()
    ends = [(first.wait(), first.communicate()[1])]
    saved = len(metrics.read_text().splitlines())
    second = start_study(file, environment)
    wait_for_steps(saved + 10, second)
    second.kill()
    third = start_study(file, environment)  # at once: the killed one's run may still be saving
    ends += [(end.wait(), end.communicate()[1]) for end in (second, third)]
    return FinishedStudy(folder, file, tuple(ends), (saved, saved + 10))


@pytest.mark.slow
def test_a_stopped_study_says_so_and_the_same_command_resumes(finished: FinishedStudy) -> None:
    code, said = finished.ends[0]
    assert code == STOPPED == 75, said
    assert "stopped by SIGTERM after step" in said
    assert "study: stopped; the same command resumes" in said
    resumed = f"resuming after step {finished.steps[0]}"
    assert resumed in finished.ends[1][1]


@pytest.mark.slow
def test_a_killed_study_stops_its_run_and_the_same_command_resumes(
    finished: FinishedStudy,
) -> None:
    (code, said), (_, again) = finished.ends[1:]
    assert code == -signal.SIGKILL
    assert "stopped by SIGTERM after step" in said, "the run was told by the system"
    (line,) = (line for line in again.splitlines() if "resuming after step" in line)
    assert int(line.rpartition("step ")[2].split()[0]) >= finished.steps[1]
    assert again.count("train-decoder: finished before") == 0


def slices_of(folder: Path, name: str) -> list[dict[str, str]]:
    with (folder / "results" / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_a_run_that_fails_is_reported_beside_the_others(finished: FinishedStudy) -> None:
    code, said = finished.ends[2]
    assert code == 1
    for name in ("base/seed0", "base/seed1", "warm/seed0"):
        assert (finished.folder / "runs" / "phantom" / name / "report" / "DONE").is_file()
    (error,) = (line for line in said.splitlines() if line.startswith("cldf: error: phantom"))
    assert error.startswith("cldf: error: phantom/broken/seed0: exit code 1, its reason is above")
    assert "/not/there" in said, "the run's own words"
    assert "broken" not in {row["variant"] for row in slices_of(finished.folder, "cases")}


def test_a_run_that_fails_stops_no_other_but_its_variants(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ablations = {"seeds": [0], "experiments": ["phantom"], "variants": {"warm": {}}}
    study = write_study(tmp_path, ablations=ablations, seeds=[0, 1])
    assert main(["study", study, "launcher=false of every word"]) == 1
    errors = capsys.readouterr().err.splitlines()[-3:]
    failed = "exit code 1, its reason is above; the same command tries again"
    assert errors == [
        f"cldf: error: phantom/base/seed0: {failed}",
        f"cldf: error: phantom/base/seed1: {failed}",
        "cldf: error: phantom/warm/seed0: the run that it varies is not finished",
    ]
    assert not (tmp_path / "results").exists()


def test_a_launcher_that_is_not_there_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["study", write_study(tmp_path), "launcher=/not/there"]) == 1
    assert "/not/there" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_a_variant_has_the_very_nets_of_its_base(finished: FinishedStudy) -> None:
    runs = finished.folder / "runs" / "phantom"
    base, warm, other = (runs / name for name in ("base/seed0", "warm/seed0", "base/seed1"))
    for stage in TRAININGS:
        net = f"{stage}/net.safetensors"
        assert (warm / net).samefile(base / net)
        assert (other / net).read_bytes() != (base / net).read_bytes(), "another seed"
    assert (warm / "cache" / "DONE").samefile(base / "cache" / "DONE")
    assert (other / "prepare" / "DONE").samefile(base / "prepare" / "DONE")
    decoder = "train-decoder/net.safetensors"
    assert (warm / decoder).read_bytes() != (base / decoder).read_bytes()
    rows = json.loads((warm / "segment" / "thresholds.json").read_text())["thresholds"]
    has = ["patch_classifier", "cldf", "cldf_plus", "patch_features"]
    assert list(rows) == has, "of the rows that a variant needs those that it has"


@pytest.mark.slow
def test_every_number_of_a_run_is_in_the_results_once(finished: FinishedStudy) -> None:
    folder = finished.folder
    cases = slices_of(folder, "cases")
    names = ("experiment", "seed", "variant", "patient", "method", "rule")
    keys = [tuple(row[name] for name in names) for row in cases]
    assert len(set(keys)) == len(keys)
    run = folder / "runs" / "phantom" / "base" / "seed1" / "evaluate"
    with (run / "cases.csv").open() as file:
        theirs = list(csv.DictReader(file))
    mine = [row for row in cases if (row["seed"], row["variant"]) == ("1", "base")]
    assert [row["dice"] for row in mine] == [row["dice"] for row in theirs]
    summary = json.loads((run / "summary.json").read_text())
    weak = {r["method"]: r for r in slices_of(folder, "weak_validation") if r["seed"] == "1"}
    for method, row in summary["weak_validation"].items():
        assert weak[method]["false_area"] == str(row["false_area"])
        assert float(weak[method]["dice"]) == summary["strict"]["methods"][method]["dice"]["mean"]
    provenance = slices_of(folder, "provenance")
    assert [(row["seed"], row["variant"]) for row in provenance] == [
        ("0", "base"), ("0", "warm"), ("1", "base"),
    ]  # fmt: skip
    assert all(float(row["seconds"]) > 0 and row["torch"] and row["device"] for row in provenance)
    for name in ("seeds", "slice_protocol", "oracle_intensity"):
        assert len({(row["seed"], row["variant"]) for row in slices_of(folder, name)}) == 3


@pytest.mark.slow
def test_results_are_small_and_tell_nothing_of_the_machine(
    finished: FinishedStudy,
) -> None:
    folder = finished.folder
    files = sorted((folder / "results").iterdir())
    pictures = [path for path in files if path.suffix == ".png"]
    assert [path.name for path in pictures] == [
        f"phantom_{which}.png" for which in ("best", "median", "worst")
    ]
    text = (folder / "results" / "tables.md").read_text()
    for path in pictures:
        assert 2_000 < path.stat().st_size < 300_000
        assert f"({path.name})" in text
    for path in files:
        if path.suffix != ".png":
            assert str(folder.parent) not in path.read_text()
    assert not [path for path in files if path.name.startswith(".")], "nothing half written"


@pytest.mark.slow
def test_a_finished_run_is_compared_with_what_is_asked_for(
    finished: FinishedStudy, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, study = finished.folder, finished.file
    before = (folder / "results" / "tables.md").read_bytes()
    quiet = "ablations.seeds=[]"  # the variant that fails is not tried again
    assert main(["study", study, quiet]) == 0
    assert (folder / "results" / "tables.md").read_bytes() == before, "a repeat changes nothing"
    assert main(["study", study, quiet, "cam.dropout=0.3"]) == 1
    said = capfd.readouterr().err
    assert "train-cam was made with cam.dropout=0.1, not 0.3; restore the setting" in said
    (folder / "results" / "tables.md").unlink()
    assert main(["study", "--tables-only", study]) == 0
    assert (folder / "results" / "tables.md").read_bytes() == before


@pytest.mark.slow
def test_pictures_of_another_evaluation_are_drawn_anew(finished: FinishedStudy) -> None:
    """As after a kill between a run's end and its pictures, or a run made anew by hand."""
    results = finished.folder / "results"
    (shown,) = slices_of(finished.folder, "pictures")
    assert (shown["seed"], shown["variant"]) == ("0", "base")
    pictures = sorted(results.glob("*.png"))
    right = [path.read_bytes() for path in pictures]
    for path in pictures:
        path.write_bytes(b"of another run")
    quiet = "ablations.seeds=[]"
    assert main(["study", finished.file, quiet]) == 0
    assert pictures[0].read_bytes() == b"of another run", "those that are there are kept"
    table = results / "pictures.csv"
    table.write_text(table.read_text().replace(shown["evaluate"], "0" * 32))
    assert main(["study", finished.file, quiet]) == 0
    assert [path.read_bytes() for path in pictures] == right


@pytest.mark.slow
def test_a_summary_of_an_earlier_version_is_one_line(
    finished: FinishedStudy, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished.folder / "runs", tmp_path / "runs")
    folder = tmp_path / "runs" / "phantom" / "base" / "seed0" / "evaluate"
    summary = json.loads((folder / "summary.json").read_text())
    del summary["slice_protocol"]
    (folder / "summary.json").write_text(json.dumps(summary))
    words = [f"runs={tmp_path / 'runs'}", f"results={tmp_path / 'results'}", "launcher=/bin/false"]
    assert main(["study", finished.file, *words]) == 1
    said = capfd.readouterr().err
    assert f"{folder} lacks 'slice_protocol': an earlier version made it; delete it" in said


@pytest.mark.slow
def test_a_run_of_nets_that_were_made_anew_is_reported(
    finished: FinishedStudy, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished.folder / "runs", tmp_path / "runs")
    runs = tmp_path / "runs" / "phantom"
    words = [f"runs={tmp_path / 'runs'}", f"results={tmp_path / 'results'}", "launcher=/bin/false"]
    identity = runs / "base" / "seed0" / "prepare" / "run.json"
    known = json.loads(identity.read_text())["id"]
    for path in (runs / "warm").rglob("run.json"):  # as if the base had been made again
        path.write_text(path.read_text().replace(known, "1" * 32))
    assert main(["study", finished.file, *words]) == 1
    said = capfd.readouterr().err
    own = runs / "warm" / "seed0"
    assert f"{own / 'prepare'} is not that of phantom/base/seed0" in said
    assert f"delete {own} to vary that run anew" in said
    identity.write_text(identity.read_text().replace(known, "1" * 32))
    assert main(["study", finished.file, *words]) == 1
    first = runs / "base" / "seed0" / "train-diffusion"
    assert f"{first} was made from another prepare than the one" in capfd.readouterr().err
