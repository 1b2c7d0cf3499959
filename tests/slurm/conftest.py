"""A real SLURM: one controller and two nodes on this machine, started in a second."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_cluster import Cluster


@pytest.fixture(scope="session")
def cluster(
    tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]
) -> Iterator[Cluster]:
    if not all(shutil.which(name) for name in ("slurmctld", "slurmd", "sbatch")):
        pytest.skip("SLURM is not installed: apt-get install slurm-wlm")
    if os.geteuid() != 0:
        pytest.skip("the test cluster's daemons run as root")
    folder = tmp_path_factory.mktemp("slurm")
    script = str(Path(__file__).parent / "cluster.sh")
    settings = folder / "cluster.env"  # not the user's own
    settings.write_text("")
    everything = {
        **environment,
        "SLURM_CONF": str(folder / "slurm.conf"),
        "CLDF_CLUSTER_ENV": str(settings),
        "CLDF_PYTHON": sys.executable,
        "CPUS": "4",  # jobs share the cores: they mostly wait for each other
        # ports come from the job's number, and each test worker has a cluster of its own
        "FIRST_JOB": str(1 + 1000 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])),
    }
    started = subprocess.run(
        [script, "start", str(folder)], env=everything, text=True, capture_output=True
    )
    try:
        assert started.returncode == 0, started.stderr
        yield Cluster(folder, everything)
    finally:
        subprocess.run([script, "stop", str(folder)], env=everything, capture_output=True)
