"""Every shipped configuration compiles well for GPUs that are not here."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="triton exists on Linux only")

FOLDER = Path(__file__).parents[2] / "kernels" / "compiled"
PROGRAM = FOLDER / "compile_all.py"


@pytest.fixture(scope="module")
def compile_all():
    sys.path.insert(0, str(FOLDER))
    try:
        import compile_all

        yield compile_all
    finally:
        sys.path.remove(str(FOLDER))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_every_configuration_keeps_the_rules_and_the_table(architecture):
    """In a process of its own: here the kernels are interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    workers = "1" if "PYTEST_XDIST_WORKER" in os.environ else str(os.cpu_count())
    words = [str(PROGRAM), "--architectures", str(architecture), "--workers", workers]
    done = subprocess.run(
        [sys.executable, *words], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    number = 96 if architecture == 100 else 112
    assert done.stdout.startswith(f"{number} configurations compiled")
    if compared_version() == triton.__version__:
        assert "compared with" in done.stdout


def compared_version():
    """The version of the newest table."""
    return max(path.stem.removeprefix("triton-") for path in FOLDER.glob("triton-*.csv"))


def test_the_program_refuses_the_interpreter():
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, str(PROGRAM)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "unset it" in done.stderr


def test_the_tables_hold_every_configuration_and_break_no_rule(compile_all):
    for path in FOLDER.glob("triton-*.csv"):
        rows = compile_all.read_snapshot(path)
        configurations = {
            (row.kernel, bool(row.online), row.precision, row.features, row.architecture)
            for row in rows
        }
        assert configurations == {dataclasses.astuple(job) for job in compile_all.jobs()}
        assert [fault for row in rows for fault in compile_all.broken_rules(row)] == []


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"stack": 8}, "spills"),
        ({"local_accesses": 2}, "spills"),
        ({"shared": 300_000}, "shared memory"),
        ({"registers": 255, "warps": 16}, "registers"),
        ({"tensor_core": 0}, "does not use the tensor cores"),
        ({"loop_instructions": 8 * 64 + 1, "loop_special": 64}, "instructions per exponential"),
        ({"loop_special": 0}, "no loop"),
        ({"precision": "fp32"}, "multiplies on tensor cores"),
    ],
)
def test_a_bad_configuration_is_found(compile_all, change, fault):
    path = next(iter(FOLDER.glob("triton-*.csv")))
    row = next(
        row
        for row in compile_all.read_snapshot(path)
        if (row.architecture, row.kernel, row.precision, row.features)
        == (90, "lse_forward", "fp16", 64)
    )
    assert compile_all.broken_rules(row) == []
    (found, *_) = compile_all.broken_rules(dataclasses.replace(row, **change))
    assert fault in found


def test_the_unmasked_loop_is_the_shortest_with_special_functions(compile_all):
    masked = "\n".join(["        /*0010*/   MUFU.EX2 R1, R2 ;"] + ["   /*0020*/   FADD R1 ;"] * 5)
    code = f"""
.L_x_0:
{masked}
        /*0030*/   @P0 BRA `(.L_x_0) ;
.L_x_1:
        /*0040*/   MUFU.EX2 R1, R2 ;
        /*0050*/   MUFU.EX2 R1, R2 ;
        /*0060*/   @!P0 BRA `(.L_x_1) ;
.L_x_2:
        /*0070*/   FADD R1, R2 ;
        /*0080*/   BRA `(.L_x_2) ;
"""
    assert compile_all.unmasked_loop(code) == (3, 2)
