"""`cldf doctor`: what it finds right, and what it finds wrong."""

import dataclasses
import http.server
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cldf_dist.__main__ import main
from cldf_dist.config import Config, Fit, Tracking
from cldf_dist.doctor import checks, measure
from cldf_dist.doctor.checks import Finding
from cldf_dist.doctor.measure import Seen

ROOT = Path(__file__).parents[2]
SEEN = Seen(
    rank=0, local_rank=0, host="n1", python="3.11.7",
    packages={"torch": "2.13.0", "accelerate": "1", "deepspeed": "0", "monai": "1", "zarr": "3"},
    device="cpu", device_bytes=0, device_free_bytes=0, driver="", shared_memory_bytes=int(8e9),
    processors=4, clock=1000.0,
)  # fmt: skip
GPU = dataclasses.replace(
    SEEN, device="H100", driver="580.1", device_bytes=int(80e9), device_free_bytes=int(79e9)
)


def seen(base: Seen = SEEN, **changes: Any) -> Seen:
    return dataclasses.replace(base, **changes)


def told(findings: Iterator[Finding]) -> list[str]:
    return [str(finding) for finding in findings]


def test_it_finds_nothing_wrong_here(debug_run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", *debug_run.words]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("cldf doctor: 1 process(es)")
    assert lines[-1] == "nothing stands in the way"
    about = {line[9:23].strip() for line in lines[1:-1] if line.startswith("ok")}
    assert {"processes", "versions", "shared memory", "disk", "locks", "data", "cache"} <= about
    assert any("42 training slices in 3 shard(s), 1 reader(s)" in line for line in lines)
    assert not list(debug_run.runs.glob(".doctor*")), "it leaves nothing behind"


def test_it_needs_no_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", f"runs={tmp_path}"]) == 0
    assert "nothing is prepared yet" in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes_are_compared_and_their_network_is_tried(
    debug_run: Any, tmp_path: Path, environment: dict[str, str]
) -> None:
    launch = ["-m", "accelerate.commands.launch", "--config_file"]
    launch += [str(ROOT / "configs" / "accelerate" / "cpu.yaml"), "-m", "cldf_dist", "doctor"]
    words = [str(ROOT / "configs" / "debug.yaml"), f"runs={tmp_path}", "tracking.enabled=false"]
    done = subprocess.run(
        [sys.executable, *launch, *words],
        env={**environment, "ACCELERATE_USE_CPU": "true"},
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 rank(s), each there once" in done.stdout
    assert "all-reduce of 64 MiB by gloo: " in done.stdout
    assert "of each other" in done.stdout
    assert done.stdout.count("nothing stands in the way") == 1


def test_a_folder_that_cannot_be_written_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert main(["doctor", f"runs={tmp_path}/file/runs"]) == 1
    printed = capsys.readouterr().out
    assert f"error    disk          cannot write {tmp_path}/file/runs" in printed
    assert printed.splitlines()[-1] == "1 error(s)"


def test_damaged_data_are_an_error(debug_run: Any, tmp_path: Path) -> None:
    run = debug_run.copy_to(tmp_path, "prepare")
    next((run.folder / "prepare").glob("*.tar")).write_bytes(b"cut")
    config = Config(name="debug", runs=str(tmp_path))
    (found,) = checks.of_data(config)
    assert found.level == "error"
    assert ".tar" in found.said


def test_too_many_readers_and_too_small_a_disk_are_told(
    debug_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Config(name="debug", runs=str(debug_run.runs))
    fit = dataclasses.replace(config.diffusion.fit, num_workers=8)
    config = dataclasses.replace(
        config, name="debug", diffusion=dataclasses.replace(config.diffusion, fit=fit)
    )
    usage = shutil.disk_usage(debug_run.runs)._replace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    monkeypatch.setattr(checks, "bytes_to_come", lambda *_: int(5e9))
    data, cache = told(checks.of_data(config))
    assert data.startswith("warning  data          42 training slices in 3 shard(s), 8 reader(s)")
    assert "fewer fit.num_workers" in data
    assert cache.startswith("error    cache         features take 5.00 GB more, 0.0 GB are free")


@pytest.mark.parametrize(
    ("everyone", "said"),
    [
        ([SEEN, seen(rank=0)], "error    processes     the ranks are [0, 0], each must be there"),
        ([SEEN, seen(rank=2)], "error    processes     the ranks are [0, 2]"),
        ([seen(rank=r, processors=2) for r in range(3)], "warning  processes     n1 has 3 proc"),
    ],
)  # fmt: skip
def test_ranks_that_are_not_what_they_should_be(everyone: list[Seen], said: str) -> None:
    assert any(line.startswith(said) for line in told(checks.of_processes(everyone)))


def test_machines_with_different_numbers_of_processes_are_told() -> None:
    everyone = [SEEN, seen(rank=1), seen(rank=2, host="n2")]
    lines = told(checks.of_processes(everyone))
    assert "3 rank(s), each there once: n1 x 2, n2 x 1" in lines[0]
    assert "different numbers of processes" in lines[1]


def test_versions_that_differ_are_named_with_their_machines() -> None:
    other = seen(rank=1, host="n2", packages={**SEEN.packages, "torch": "2.11.0"}, python="3.12.1")
    (line,) = told(checks.of_versions([SEEN, other]))
    assert line.startswith("error    versions      python 3.11.7 on n1, 3.12.1 on n2; ")
    assert "torch 2.11.0 on n2, 2.13.0 on n1; use one environment on all nodes" in line
    missing = seen(packages={**SEEN.packages, "monai": "not installed"})
    lines = told(checks.of_versions([missing]))
    assert lines[1].startswith("warning  versions      monai is not installed; pip install")


@pytest.mark.parametrize(
    ("everyone", "said"),
    [
        ([GPU, seen(GPU, rank=1, local_rank=1)], "ok       devices       H100, driver 580.1"),
        ([GPU, seen(rank=1)], "error    devices       some processes have a GPU, others none"),
        ([GPU, seen(GPU, rank=1)], "error    devices       two processes share a GPU; give each"),
        ([GPU, seen(GPU, rank=1, host="n2", driver="550")], "warning  devices       different"),
        ([seen(GPU, device_free_bytes=int(9e9))], "warning  devices       H100, driver 580.1"),
        ([SEEN], "ok       devices       no GPU"),
    ],
)  # fmt: skip
def test_gpus_are_compared(everyone: list[Seen], said: str) -> None:
    assert any(line.startswith(said) for line in told(checks.of_devices(everyone)))


def test_little_shared_memory_matters_to_loader_workers_alone() -> None:
    little = [SEEN, seen(rank=1, host="n2", shared_memory_bytes=int(64e6))]
    alone = Config()
    (line,) = told(checks.of_shared_memory(little, alone))
    assert line.startswith("ok       shared memory 0.1 GB free in /dev/shm of n2")
    fit = Fit(num_workers=4)
    workers = dataclasses.replace(alone, cam=dataclasses.replace(alone.cam, fit=fit))
    (line,) = told(checks.of_shared_memory(little, workers))
    assert line.startswith("warning  shared memory")
    assert "fit.num_workers=4; enlarge it" in line


def test_clocks_that_differ_are_told() -> None:
    assert not told(checks.of_clocks([SEEN]))
    (line,) = told(checks.of_clocks([SEEN, seen(rank=1, clock=1000.2)]))
    assert line.startswith("ok       clocks        within 0.20 s")
    (line,) = told(checks.of_clocks([SEEN, seen(rank=1, clock=1090.0)]))
    assert line.startswith("warning  clocks        they differ by 90.0 s")


def test_slurm_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert not told(checks.of_slurm())
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/sbatch")
    assert "outside of an allocation" in told(checks.of_slurm())[0]
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    assert "job 17: 2 node(s), " in told(checks.of_slurm())[0]


def test_a_tracking_server_is_asked() -> None:
    class Health(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Health) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        uri = f"http://127.0.0.1:{server.server_port}"
        there = Config(tracking=Tracking(uri=uri))
        assert told(checks.of_tracking(there)) == [f"ok       mlflow        {uri} answers (200)"]
        server.shutdown()
    (line,) = told(checks.of_tracking(there))
    assert line.startswith(f"warning  mlflow        {uri} does not answer")
    assert "metrics.jsonl holds everything" in line
    off = Config(tracking=Tracking(enabled=False))
    assert "switched off" in told(checks.of_tracking(off))[0]


def test_a_folder_that_others_do_not_see_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "SEEN_SECONDS", 0.2)
    assert not told(checks._one_folder(tmp_path))
    monkeypatch.setattr(checks, "gather_objects", lambda sees: [sees, False])
    (line,) = told(checks._one_folder(tmp_path))
    assert line.startswith("error    disk          processes [1] do not see what process 0 writes")
    assert not measure.appears(tmp_path / "never")


def test_slow_disks_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config(runs=str(tmp_path))
    monkeypatch.setattr(checks, "disk_pace", lambda folder: (5e6, 1000.0))
    lines = told(checks.of_folder(config))
    assert lines[0].startswith(f"warning  disk          {tmp_path}: ")
    assert "5 MB/s written" in lines[0]
    assert "put runs= on the scratch file system" in lines[0]
    assert json.dumps(lines).count("flock works") == 1
