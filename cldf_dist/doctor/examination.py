"""Run every check and print each finding as soon as it is known.

On one process, or on all of a launch: every process tells what it sees, and the main one compares.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

from cldf_dist.config import Config
from cldf_dist.doctor import checks
from cldf_dist.doctor.checks import Finding
from cldf_dist.doctor.measure import look_around
from cldf_dist.system.distributed import TIMEOUT, accelerator, gather_objects, processes

PATIENCE_SECONDS = "120"  # a network that hangs is a finding, not a wait


def examine(config: Config) -> int:
    """Print every finding as soon as it is known; 1 where there is an error, else 0."""
    os.environ.setdefault(TIMEOUT, PATIENCE_SECONDS)
    _say(f"cldf doctor: {processes().world_size} process(es), run folder {config.run_folder}")
    errors = 0
    for finding in _findings(config):
        _say(str(finding))
        errors += finding.level == "error"
    if processes().is_main:
        _say(f"{errors} error(s)" if errors else "nothing stands in the way")
    return int(any(gather_objects(errors)))


def _findings(config: Config) -> Iterator[Finding]:
    try:
        accelerator()
    except (RuntimeError, ValueError) as problem:
        yield Finding("error", "processes", str(problem))
        return
    everyone = look_around()
    yield from checks.of_processes(everyone)
    yield from checks.of_versions(everyone)
    yield from checks.of_devices(everyone)
    yield from checks.of_shared_memory(everyone, config)
    yield from checks.of_clocks(everyone)
    yield from checks.of_network()
    yield from checks.of_kernels()
    yield from checks.of_slurm()
    yield from checks.of_folder(config)
    if processes().is_main:
        yield from checks.of_data(config)
        yield from checks.of_tracking(config)


def _say(text: str) -> None:
    if processes().is_main:
        print(text, flush=True)
    elif text.startswith("error"):
        print(f"process {processes().rank}: {text}", file=sys.stderr, flush=True)
