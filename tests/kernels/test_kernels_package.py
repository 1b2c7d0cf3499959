"""kernels/ installs cldf_kernels alone."""

import ast
import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[2] / "kernels"


PROGRAM = """
import cldf_kernels, torch
from cldf_kernels import supcon_loss

assert cldf_kernels.__file__.startswith({folder!r}), cldf_kernels.__file__
z = torch.nn.functional.normalize(torch.randn(40, 5), dim=1).requires_grad_()
labels = torch.arange(40) % 3
losses = [supcon_loss(z, labels, temperature=0.1, backend=backend) for backend in {backends}]
sum(losses).backward()
assert max(losses) - min(losses) < 1e-3, losses
"""


@pytest.mark.skipif(importlib.util.find_spec("hatchling") is None, reason="hatchling is missing")
@pytest.mark.skipif(importlib.util.find_spec("pip") is None, reason="pip is missing")
def test_the_package_installs_and_works_alone(tmp_path):
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    quiet = {"check": True, "capture_output": True, "text": True}
    options = ["--quiet", "--no-deps", "--no-index"]
    command = [*pip, "wheel", *options, "--no-build-isolation", "--wheel-dir", str(tmp_path)]
    subprocess.run([*command, str(KERNELS)], **quiet)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    folders = {name.split("/")[0] for name in names}
    assert {folder for folder in folders if not folder.endswith(".dist-info")} == {"cldf_kernels"}
    modules = {
        path.relative_to(KERNELS).as_posix() for path in KERNELS.glob("cldf_kernels/**/*.py")
    }
    assert modules < set(names)
    folder = tmp_path / "installed"
    subprocess.run([*pip, "install", *options, "--target", str(folder), str(wheel)], **quiet)
    backends = ["torch", "reference"]
    backends += ["triton"] if importlib.util.find_spec("triton") else []
    program = PROGRAM.format(folder=str(folder), backends=backends)
    environment = os.environ | {"PYTHONPATH": str(folder), "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, **quiet)


def names_in(path):
    """Every identifier of a file, those of attributes and arguments included."""
    for node in ast.walk(ast.parse(path.read_text())):
        yield from (getattr(node, field, None) for field in ("id", "attr", "arg"))


def test_the_temperature_goes_from_yaml_to_the_launch_of_a_kernel_through_five_files():
    """One default, in the first of them. The kernels' other ways and the doctor's trial apart."""
    root = KERNELS.parent
    paths = [*(KERNELS / "cldf_kernels").rglob("*.py"), *(root / "cldf_dist").rglob("*.py")]
    handle = {
        path.relative_to(root).as_posix() for path in paths if "temperature" in names_in(path)
    }
    kernels = "kernels/cldf_kernels"
    other_ways = {
        f"{kernels}/{n}.py" for n in ("torch_passes", "definition", "reference", "module")
    }
    assert handle - other_ways - {"cldf_dist/doctor/measure.py"} == {
        "cldf_dist/config/nets.py",
        "cldf_dist/stages/train_decoder.py",
        "cldf_dist/tasks/contrast.py",
        f"{kernels}/supcon.py",
        f"{kernels}/triton_passes.py",
    }
