"""The shapes that annotations claim are those that the functions take and return."""

import importlib.util
import os
import subprocess
import sys

import cldf_kernels
import pytest

# In a process of its own: the hook changes modules while they are imported. Triton compiles the
# functions in triton_kernels from their source, so these are left as they are.
PROGRAM = """
import importlib, importlib.util, itertools, pathlib, pkgutil, sys, tempfile
import torch
import torch.distributed as dist
from jaxtyping import TypeCheckError, install_import_hook

backend = sys.argv[1]
folder = pathlib.Path(importlib.util.find_spec("cldf_kernels").origin).parent
names = [f"cldf_kernels.{module.name}" for module in pkgutil.iter_modules([str(folder)])]
names.remove("cldf_kernels.triton_kernels")
with install_import_hook(names, "beartype.beartype"):
    from cldf_kernels import SupConLoss, supcon_loss, supcon_reference
    if backend == "triton":
        importlib.import_module("cldf_kernels.triton_passes")
assert hasattr(supcon_loss, "__wrapped__"), "the hook is not on"

generator = torch.Generator().manual_seed(0)
def normal(*shape):
    return torch.nn.functional.normalize(torch.randn(*shape, generator=generator), dim=1)
embeddings, labels = normal(60, 8).requires_grad_(), torch.arange(60) % 4 - 1
choices = {
    "negatives": ["all", "other"],
    "temperature": [0.1, 0.004, torch.tensor(0.1, requires_grad=True)],
    "reduction": ["mean", "none"],
    "deterministic": [False, True],
}
extras = [
    {},
    {"group": torch.arange(60) % 3, "weight": torch.rand(60, generator=generator)},
    {"bank": normal(20, 8), "bank_labels": torch.arange(20) % 4 - 1},
]
dist.init_process_group(
    "gloo", init_method=f"file://{tempfile.mkdtemp()}/meet", rank=0, world_size=1
)
for number, (*chosen, extra) in enumerate(itertools.product(*choices.values(), extras)):
    options = dict(zip(choices, chosen)) | extra
    group = dist.group.WORLD if number % 2 else None
    loss = supcon_loss(embeddings, labels, process_group=group, backend=backend, **options)
    loss.backward(torch.ones_like(loss))
dist.destroy_process_group()
supcon_reference(embeddings, labels, temperature=0.1).backward()
SupConLoss(temperature=0.1, backend=backend)(embeddings, labels).backward()

wrong = [
    {"embeddings": embeddings[None]},
    {"labels": labels[:-1]},
    {"labels": labels[:, None]},
    {"labels": labels.float()},
    {"weight": torch.ones(59)},
    {"group": labels[None]},
]
wrong_banks = [
    {"bank": normal(20, 7), "bank_labels": labels[:20]},
    {"bank": normal(20, 8), "bank_labels": labels},
]
right = {"embeddings": embeddings, "labels": labels}
calls = [(SupConLoss(temperature=0.1), right | change) for change in wrong]
for change in wrong + wrong_banks:
    calls.append((supcon_loss, right | {"temperature": 0.1} | change))
    calls.append((supcon_reference, right | {"temperature": 0.1} | change))
for function, arguments in calls:
    try:
        function(**arguments)
    except TypeCheckError:
        continue
    sys.exit(f"{function} takes {({n: getattr(v, 'shape', v) for n, v in arguments.items()})}")
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("beartype") is None, reason="beartype is missing")
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_annotated_shapes_hold_forward_and_backward_and_others_are_refused(backend):
    if backend == "triton":
        pytest.importorskip("triton", reason="triton exists on Linux only")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, backend],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_annotations_cost_nothing_where_the_hook_is_off():
    functions = (cldf_kernels.supcon_loss, cldf_kernels.supcon_reference)
    functions += (cldf_kernels.SupConLoss.forward, cldf_kernels.SupConLoss.__init__)
    for function in functions:
        assert not hasattr(function, "__wrapped__"), function
