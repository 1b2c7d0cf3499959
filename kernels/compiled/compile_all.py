"""Compile every shipped kernel configuration without a GPU, and look at the machine code.

    python kernels/compiled/compile_all.py            # compare with this version's table
    python kernels/compiled/compile_all.py --write    # write the table anew; its diff is for review

Each row: registers a thread, bytes of stack (spills), shared memory, tensor-core instructions of
the architecture, asynchronous copies, and for the unmasked loop the number of instructions and of
special-function instructions (exponential, logarithm, reciprocal). Exits with 1 where a rule is
broken or the table differs. TRITON_INTERPRET must not be set.
"""

import argparse
import csv
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cldf_kernels.triton_kernels.tile_shapes import TileShape

FOLDER = Path(__file__).parent
ELEMENT = {"fp16": "fp16", "bf16": "bf16", "tf32": "fp32", "fp32": "fp32"}
TENSOR_CORES = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
SHARED_LIMIT = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # 80: that of 8.6, 8.9 and 12.0
INSTRUCTIONS_LIMIT = 8.0  # per special-function instruction: 128 lanes against 16


@dataclass(frozen=True)
class Job:
    kernel: str
    online: bool  # outside the range where exp needs no shift; False for kernels without the choice
    precision: str
    features: int
    architecture: int


@dataclass(frozen=True)
class Row:
    """One configuration; numbers of the machine code are strings as they stand in the table."""

    architecture: int
    kernel: str
    online: int
    precision: str
    features: int
    tile: str
    warps: int
    stages: int
    registers: int
    stack: int
    local_accesses: int
    shared: int
    tensor_core: int
    fused_multiply_adds: int
    asynchronous_copies: int
    loop_instructions: int
    loop_special: int


def jobs() -> Iterator[Job]:
    from cldf_kernels.triton_kernels.tile_shapes import (
        ARCHITECTURES,
        FEATURES,
        has_symmetric_forward,
    )

    variants = [
        ("lse_forward_symmetric", False),
        ("lse_forward", False),
        ("lse_forward", True),
        ("lse_backward", False),
        ("lse_backward", True),
        ("softplus_forward", False),
        ("softplus_backward", False),
    ]
    for architecture in ARCHITECTURES:
        for kernel, online in variants:
            if kernel == "lse_forward_symmetric" and not has_symmetric_forward(architecture):
                continue
            for precision in ELEMENT:
                for features in FEATURES:
                    yield Job(kernel, online, precision, features, architecture)


def compile_job(job: Job) -> Row | str:
    """Return the row of one configuration, or why it does not compile."""
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module = importlib.import_module(f"cldf_kernels.triton_kernels.{job.kernel}")
    kernel = getattr(module, f"{job.kernel}_kernel")
    shape = _tile_shape(job)
    constants = _constants(job, shape)
    names = kernel.arg_names
    types = {"queries": f"*{ELEMENT[job.precision]}", "keys": f"*{ELEMENT[job.precision]}"}
    types |= {"blocks": "*i32", "num_keys": "i32", "tiles_per_program": "i32"}
    signature = {
        name: "constexpr" if name in constants else types.get(name, "*fp32") for name in names
    }
    source = ASTSource(
        kernel,
        signature=signature,
        constexprs={(names.index(k),): v for k, v in constants.items() if k in names},
        attrs={
            (names.index(name),): [["tt.divisibility", 16]]
            for name, kind in signature.items()
            if kind.startswith("*")
        },
    )
    options = {"num_warps": shape.num_warps, "num_stages": shape.num_stages}
    target = GPUTarget("cuda", job.architecture, 32)
    try:
        compiled = triton.compile(source, target=target, options=options)
    except Exception as error:  # the compiler raises what its passes raise
        return f"{job}: {type(error).__name__}: {str(error)[:300]}"
    usage, code = _disassemble(compiled.asm["cubin"], Path(triton.__file__).parent)
    instructions, special = unmasked_loop(code)
    return Row(
        architecture=job.architecture,
        kernel=job.kernel,
        online=int(job.online),
        precision=job.precision,
        features=job.features,
        tile=f"{shape.block_queries}x{shape.block_keys}x{shape.block_features}",
        warps=shape.num_warps,
        stages=shape.num_stages,
        registers=_number(r"REG:(\d+)", usage),
        stack=_number(r"STACK:(\d+)", usage),
        local_accesses=_count("LDL", code) + _count("STL", code),
        shared=compiled.metadata.shared,
        tensor_core=_count(TENSOR_CORES[job.architecture], code),
        fused_multiply_adds=_count("FFMA2?", code),
        asynchronous_copies=_count("LDGSTS", code) + _count("UTMALDG", code),
        loop_instructions=instructions,
        loop_special=special,
    )


def _tile_shape(job: Job) -> "TileShape":
    from cldf_kernels.triton_kernels.tile_shapes import backward_shape, forward_shape

    choose = backward_shape if job.kernel.endswith("backward") else forward_shape
    return choose(job.architecture, job.precision, job.features)


def _constants(job: Job, shape: "TileShape") -> dict[str, int | str]:
    from cldf_kernels.triton_kernels.tile_shapes import INPUT_PRECISION

    return {
        "FEATURES": job.features,
        "BLOCK_FEATURES": shape.block_features,
        "BLOCK_QUERIES": shape.block_queries,
        "BLOCK_KEYS": shape.block_keys,
        "ONLINE": job.online,
        "PRECISION": INPUT_PRECISION[job.precision],
    }


def broken_rules(row: Row) -> list[str]:
    """The faults of one configuration, a sentence each."""
    where = (
        f"sm_{row.architecture} {row.kernel} online={row.online} {row.precision} D={row.features}"
    )
    rules = {
        "spills registers": row.stack == 0 and row.local_accesses == 0,
        "takes too much shared memory": row.shared <= SHARED_LIMIT[row.architecture],
        "takes too many registers": row.registers * row.warps * 32 <= 65536,
        "has no loop with exponentials": row.loop_special > 0,
    }
    if row.precision == "fp32":
        rules["multiplies on tensor cores"] = row.tensor_core == 0
        rules["has no fused multiply-add"] = row.fused_multiply_adds > 0
    else:
        rules["does not use the tensor cores"] = row.tensor_core > 0
    if row.precision in ("fp16", "bf16") and row.features <= 64 and row.loop_special:
        ratio = row.loop_instructions / row.loop_special
        rules[f"has {ratio:.2f} instructions per exponential"] = ratio <= INSTRUCTIONS_LIMIT
    return [f"{where} {what}" for what, holds in rules.items() if not holds]


def unmasked_loop(code: str) -> tuple[int, int]:
    """Instructions and special-function instructions of the shortest loop that has any.

    The masked loop does the same and more, so the unmasked one is the shortest.
    """
    labels: dict[str, int] = {}
    instructions: list[str] = []
    for line in code.splitlines():
        label = re.match(r"\s*(\.L_x_\d+):", line)
        instruction = re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?);", line)
        if label:
            labels[label[1]] = len(instructions)
        elif instruction:
            instructions.append(instruction[1])
    loops = []
    for end, instruction in enumerate(instructions):
        jump = re.search(r"BRA.*`\((\.L_x_\d+)\)", instruction)
        if jump and labels.get(jump[1], len(instructions)) < end:
            body = instructions[labels[jump[1]] : end + 1]
            special = sum("MUFU" in line for line in body)
            if special:
                loops.append((len(body), special))
    return min(loops, default=(0, 0))


def _disassemble(cubin: bytes, triton: Path) -> tuple[str, str]:
    tools = triton / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return tuple(  # type: ignore[return-value]
            subprocess.run([tools / tool, *options, file.name], capture_output=True, text=True,
                           check=True).stdout
            for tool, *options in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c", "-ndf"))
        )  # fmt: skip


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found[1]) if found else -1


def _count(mnemonic: str, code: str) -> int:
    return len(re.findall(rf"\b{mnemonic}\b", code))


def snapshot_path() -> Path:
    import triton

    return FOLDER / f"triton-{triton.__version__}.csv"


def read_snapshot(path: Path) -> list[Row]:
    kinds: dict[str, Any] = {field.name: field.type for field in fields(Row)}
    with path.open(newline="") as file:
        return [
            Row(**{name: kinds[name](value) for name, value in row.items()})
            for row in csv.DictReader(file)
        ]


def write_snapshot(path: Path, rows: list[Row]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--write", action="store_true", help="write the table of this version")
    parser.add_argument("--architectures", type=int, nargs="*", help="only these")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        parser.error("TRITON_INTERPRET=1 replaces the compiler; unset it")
    chosen = [
        job
        for job in jobs()
        if not arguments.architectures or job.architecture in arguments.architectures
    ]
    with ProcessPoolExecutor(arguments.workers) as pool:
        results = list(pool.map(compile_job, chosen, chunksize=1))
    rows = [result for result in results if isinstance(result, Row)]
    faults = [result for result in results if isinstance(result, str)]
    faults += [fault for row in rows for fault in broken_rules(row)]
    path = snapshot_path()
    if arguments.write:
        write_snapshot(path, rows)
        print(f"{len(rows)} configurations written to {path.name}")
    elif path.exists():
        expected = [
            row
            for row in read_snapshot(path)
            if not arguments.architectures or row.architecture in arguments.architectures
        ]
        for row in sorted(set(expected) ^ set(rows), key=str):
            faults.append(f"{'missing' if row in expected else 'new'}: {row}")
        print(f"{len(rows)} configurations compiled, compared with {path.name}")
    else:
        print(f"{len(rows)} configurations compiled; no table for this version of triton")
    for fault in faults:
        print(fault)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
