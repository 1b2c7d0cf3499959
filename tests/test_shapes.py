"""Shapes in annotations: true in the whole pipeline, complete, and free where none is checked."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cldf_dist.stages import STAGES

ROOT = Path(__file__).parents[1]
# The hook changes modules while they are imported, so it works in processes of its own. Left out:
# Triton compiles `triton_kernels` from their source; beartype cannot check arguments whose type is
# a Protocol (`PixelLabels` in inference/training_pixels.py and seed_sources.py).
SWITCH_ON = """
import importlib.util, pathlib, pkgutil, sys
import torch
from jaxtyping import TypeCheckError, install_import_hook

folder = pathlib.Path(importlib.util.find_spec("cldf_kernels").origin).parent
kernels = {f"cldf_kernels.{module.name}" for module in pkgutil.iter_modules([str(folder)])}
inference = ("feature_extraction", "frozen_nets", "loading", "patch_maps", "saliency_agreement")
checked = [
    *(f"cldf_dist.{name}" for name in ("maths", "method", "nets", "tasks")),
    *(f"cldf_dist.inference.{name}" for name in (*inference, "score_maps", "seed_cam")),
    *(kernels - {"cldf_kernels.triton_kernels"}),
]
install_import_hook(checked, "beartype.beartype")
"""
PIPELINE = """
from cldf_dist.__main__ import main

code = main(["run", *sys.argv[1:]])
assert hasattr(sys.modules["cldf_dist.nets.decoder"].PixelDecoder.forward, "__wrapped__")
sys.exit(code)
"""
WRONG = """
from cldf_dist.maths.scaling import scale_to_unit
from cldf_dist.method.cam import CamPass, gradcam
from cldf_dist.method.noise import Schedule, sample_noise
from cldf_dist.method.prototypes import class_prototypes, prototype_score
from cldf_dist.nets.decoder import PixelDecoder
from cldf_dist.nets.patch_classifier import pooled_logit
from cldf_dist.tasks.contrast import Contrast

inside = torch.ones(2, 4, 4, dtype=torch.bool)
steps = torch.zeros(2, dtype=torch.long)
images, maps = torch.rand(2, 3, 4, 4), torch.rand(2, 4, 4)
schedule, decoder = Schedule(10, "cosine", "epsilon"), PixelDecoder({"tap": 5}, 4, 3)
pixels, labels = torch.rand(6, 5), torch.arange(6) % 2
calls = {
    "a map per channel": (scale_to_unit, (images, inside), (maps, inside)),
    "a mask of floats": (scale_to_unit, (maps, maps), (maps, inside)),
    "too few masks": (pooled_logit, (maps, inside[:1], 0.5), (maps, inside, 0.5)),
    "a column": (class_prototypes, (pixels, labels[:, None]), (pixels, labels)),
    "other features": (prototype_score, (pixels, pixels[:2, :4]), (pixels, pixels[:2])),
    "noise of one image": (
        schedule.add_noise, (images, steps, images[:1]), (images, steps, images)
    ),
    "timesteps of floats": (schedule.snr, (steps.float(),), (steps,)),
    "numbers in rows": (
        sample_noise, ((2,), steps[None], 0, "noise", "cpu"), ((2,), steps, 0, "noise", "cpu")
    ),
    "other channels": (gradcam, (images, images[:, :1]), (images, images)),
    "a field": (
        CamPass, (images, images, maps[:, 0], (8, 8)), (images, images, maps[:, 0, 0], (8, 8))
    ),
    "statistics of others": (
        decoder.standardise, (pixels[0], pixels[0, :4]), (pixels[0], pixels[0])
    ),
    "whole numbers": (decoder, (pixels.long(),), (pixels,)),
}
for name, (function, wrong, right) in calls.items():
    function(*right)
    try:
        function(*wrong)
    except TypeCheckError:
        continue
    sys.exit(f"{name}: {function} takes {[getattr(v, 'shape', v) for v in wrong]}")
try:
    Contrast(decoder, temperature="hot")
except TypeCheckError:
    sys.exit(0)
sys.exit("a word as temperature")
"""
FREE = """
import importlib, sys

import torch

for name in sys.argv[1:]:
    module = importlib.import_module(name)
assert "beartype" not in sys.modules and "jax" not in sys.modules
assert not hasattr(sys.modules["cldf_dist.nets.decoder"].PixelDecoder.forward, "__wrapped__")
assert not hasattr(sys.modules["cldf_dist.maths.scaling"].scale_to_unit, "__wrapped__")
"""
SHAPED = [
    path
    for path in sorted((ROOT / "cldf_dist").rglob("*.py"))
    if "from jaxtyping import" in path.read_text()
]


def run(program: str, *words: str) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program, *words]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_annotated_shapes_hold_in_all_stages_of_the_debug_pipeline(tmp_path: Path) -> None:
    settings = ("configs/debug.yaml", f"runs={tmp_path}", "tracking.enabled=false")
    run(SWITCH_ON + PIPELINE, *settings)
    assert {path.parent.name for path in tmp_path.glob("debug/*/DONE")} == {s.name for s in STAGES}


@pytest.mark.slow
def test_a_wrong_shape_or_type_is_refused_where_the_hook_is_on() -> None:
    run(SWITCH_ON + WRONG)


def test_annotations_cost_nothing_where_the_hook_is_off() -> None:
    names = (".".join(path.relative_to(ROOT).with_suffix("").parts) for path in SHAPED)
    run(FREE, *names)
    for path in SHAPED:
        assert "from __future__ import annotations" in path.read_text(), f"{path} builds them"


def public_functions(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    """Functions of a module and methods of its classes, without those that begin with _."""
    bodies = [tree.body]
    bodies += [n.body for n in tree.body if isinstance(n, ast.ClassDef) and n.name[0] != "_"]
    for node in (node for body in bodies for node in body):
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield node


def test_a_module_that_says_shapes_says_those_of_all_public_functions() -> None:
    folders = {path.parent.name for path in SHAPED}
    assert {"maths", "method", "nets", "tasks", "inference"} <= folders
    for path in SHAPED:
        for function in public_functions(ast.parse(path.read_text())):
            arguments = [*function.args.args, *function.args.kwonlyargs]
            for annotation in (function.returns, *(a.annotation for a in arguments)):
                said = "" if annotation is None else ast.unparse(annotation)
                bare = said.replace("torch.", "").removesuffix(" | None") == "Tensor"
                assert not bare, f"{path.name}: {function.name} has a tensor without a shape"
