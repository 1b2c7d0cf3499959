"""kernels/ installs cldf_kernels alone."""

import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[2] / "kernels"


@pytest.mark.skipif(importlib.util.find_spec("hatchling") is None, reason="hatchling is missing")
@pytest.mark.skipif(importlib.util.find_spec("pip") is None, reason="pip is missing")
def test_wheel_holds_cldf_kernels_alone(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index"]
    command += ["--no-build-isolation", "--wheel-dir", str(tmp_path), str(KERNELS)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    folders = {name.split("/")[0] for name in names}
    assert {folder for folder in folders if not folder.endswith(".dist-info")} == {"cldf_kernels"}
    modules = {path.name for path in (KERNELS / "cldf_kernels").iterdir() if path.is_file()}
    assert {f"cldf_kernels/{name}" for name in modules} <= set(names)
