"""Run one stage or all, on one process or many; say what would be done; print the tables."""

from __future__ import annotations

import json
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from cldf_dist.config import Config, to_yaml
from cldf_dist.runs.run import Run, command_for, room_explained, seconds_of, write_atomically
from cldf_dist.runs.tracking import store_uri
from cldf_dist.stages import STAGES, Stage, part_folder, stage_named
from cldf_dist.system.distributed import broadcast_object, processes, wait_for_everyone
from cldf_dist.system.signals import Stopped
from cldf_dist.training.schedule import check_batch

HEARTBEAT_SECONDS = 5.0
POLL_SECONDS = 0.2


def run_all(config: Config) -> None:
    """All stages in order; finished ones are skipped."""
    _check_batches(config)
    for stage in STAGES:
        received_signal = run_stage(config, stage)
        if received_signal:
            raise Stopped(received_signal, f"when {stage.name} was finished")
    if processes().is_main:
        print(summary(config))


def _check_batches(config: Config) -> None:
    """ValueError for a training, of those to come, whose batch these processes cannot share."""
    for stage in STAGES:
        if not stage.fit_section or broadcast_object(_run_of(config, stage).is_finished):
            continue
        name = stage.fit_section.removesuffix(".fit")
        section: Any = getattr(config, name)
        if getattr(section, "enabled", True):
            check_batch(stage.fit_section, section.fit, processes().world_size)


def run_stage(config: Config, stage: Stage) -> int:
    """One stage, unless it is finished. Raises what the stage raises, on every process.

    Returns the signal that asked for a stop when the stage was all but done; 0 without one.
    """
    run = _run_of(config, stage)
    for name in stage.needs:
        run.needs(name)
        _check_chain(config, stage_named(name))
    again = stage.name == "cache" and config.cache.verify
    if broadcast_object(run.is_finished) and not again:
        _check_finished(config, stage, run)
        _say(f"{stage.name}: finished before, in {run.folder}")
        _finish_parts(config, stage)
        return 0
    _say(f"{stage.name}: {stage.does}")
    with _fast_arithmetic(stage):
        if stage.distributed or processes().world_size == 1:
            _run_together(config, stage, run, again)
        else:
            _run_on_main(config, stage, run)
    _finish_parts(config, stage)
    return run.stop_requested


def _run_of(config: Config, stage: Stage) -> Run:
    return Run(config, part_folder(stage, config), stage.all_sections, stage.needs)


def _finish_parts(config: Config, stage: Stage) -> None:
    """After the last part of a stage the stage itself."""
    if part_folder(stage, config) == stage.name:
        return
    whole = replace(config, cache=replace(config.cache, part=""))
    run = _run_of(whole, stage)
    parts = int(config.cache.part.split("/")[1])
    finished = [
        (run.folder / "parts" / f"{number}-of-{parts}" / "DONE").exists()
        for number in range(1, parts + 1)
    ]
    if not broadcast_object(all(finished)):
        return
    try:
        run_stage(whole, stage)
    except RuntimeError as error:
        if "is in use by" not in str(error):
            raise
        _say(f"{stage.name}: another part finishes it")


def _check_chain(config: Config, stage: Stage) -> None:
    """Raise ValueError where a finished stage was made from inputs that have been remade since."""
    _run_of(config, stage).check_unchanged()
    for name in stage.needs:
        _check_chain(config, stage_named(name))


def _check_finished(config: Config, stage: Stage, run: Run) -> None:
    run.check_unchanged()
    check = getattr(stage.module, "check_unchanged", None) if run.is_main else None
    if check is not None:
        check(config, run.folder)


def _run_together(config: Config, stage: Stage, run: Run, again: bool) -> None:
    """Every process works; the main process owns the folder. `again`: also where it is finished."""
    problem: Exception | None = None
    if run.is_main:
        try:
            run.open()
        except Exception as error:
            problem = error
    # somebody else may have finished it between our look and our lock
    problem, finished = broadcast_object((problem, run.is_finished and not again))
    if problem is not None:
        raise problem
    try:
        if not finished:
            _work(config, stage, run)
    finally:
        run.close()
    wait_for_everyone()


def _run_on_main(config: Config, stage: Stage, run: Run) -> None:
    """Main works; the other ranks poll its heartbeat file, not a collective that times out."""
    attempt = broadcast_object(uuid.uuid4().hex)
    heartbeat = run.folder / ".attempt.json"
    if not run.is_main:
        _follow(run, heartbeat, attempt, config.run.heartbeat_seconds)
        return
    try:
        run.folder.mkdir(parents=True, exist_ok=True)
        with _heartbeat(heartbeat, attempt):
            run.open()
            if not run.is_finished:
                _work(config, stage, run)
    except BaseException as error:
        _write_heartbeat(
            heartbeat, attempt, failed=" ".join(str(error).split()) or type(error).__name__
        )
        raise
    finally:
        run.close()


def _work(config: Config, stage: Stage, run: Run) -> None:
    with room_explained(run.folder):
        run.finish(stage.execute(config, run))


def _follow(run: Run, heartbeat: Path, attempt: str, patience: float) -> None:
    last, heard = "", time.monotonic()
    while not run.is_finished:
        time.sleep(POLL_SECONDS)
        text = heartbeat.read_text() if heartbeat.exists() else ""
        if text != last:
            last, heard = text, time.monotonic()
        said = json.loads(text) if text else {}
        if said.get("attempt") == attempt and said.get("failed"):
            raise RuntimeError(f"{run.stage} failed on the main process: {said['failed']}")
        if time.monotonic() - heard > patience:
            raise TimeoutError(
                f"{run.stage}: no sign of the main process for {patience:.0f} s "
                "(run.heartbeat_seconds); look at its log"
            )


@contextmanager
def _heartbeat(path: Path, attempt: str) -> Iterator[None]:
    stop = threading.Event()

    def repeat() -> None:
        number = 0
        while not stop.is_set():
            _write_heartbeat(path, attempt, heartbeat=number)
            number += 1
            stop.wait(HEARTBEAT_SECONDS)

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _write_heartbeat(path: Path, attempt: str, **said: Any) -> None:
    with suppress(OSError):  # a hiccup of the file system: the next one tries again
        write_atomically(path, json.dumps({"attempt": attempt, **said}))


@contextmanager
def _fast_arithmetic(stage: Stage) -> Iterator[None]:
    """While nets are at work denormals are zero, and float32 products may use TF32 on GPUs.

    Not elsewhere: SciPy's KDTree splits at nextafter(0), and where that is 0 it recurses without
    end. The stages that only the main process works on run no nets.
    """
    import torch

    if not stage.distributed:
        yield
        return
    precision = torch.get_float32_matmul_precision()
    torch.set_flush_denormal(True)
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
        torch.set_float32_matmul_precision(precision)


def dry_run(config: Config, stages: tuple[Stage, ...]) -> str:
    """The resolved configuration, and per stage its inputs, outputs and estimates."""
    lines = [to_yaml(config).rstrip(), ""]
    for stage in stages:
        folder = config.run_folder / stage.name
        state = "finished" if (folder / "DONE").exists() else "to do"
        lines.append(f"{stage.name}: {stage.does}")
        lines.append(f"  output: {folder} ({state})")
        for need in stage.needs:
            ready = (config.run_folder / need / "DONE").exists()
            found = "finished" if ready else f"missing; made by: {command_for(need)}"
            lines.append(f"  input:  {config.run_folder / need} ({found})")
        if stage.fit_section:
            fit = getattr(config, stage.fit_section.split(".")[0]).fit
            lines.append(f"  steps:  {fit.steps} of {fit.batch_size} samples over all processes")
        estimate: Callable[[Config, Path], dict[str, str]] | None
        estimate = getattr(stage.module, "estimate", None) if state == "to do" else None
        if estimate is not None:
            lines += [f"  {key}: {value}" for key, value in estimate(config, folder).items()]
    return "\n".join(lines)


def summary(config: Config) -> str:
    """Time per stage, the results table, and where everything is."""
    folder = config.run_folder
    lines = ["", "stage                  seconds"]
    total = 0.0
    for stage in STAGES:
        seconds = seconds_of(folder / stage.name)
        total += seconds
        lines.append(f"{stage.name:<22} {seconds:>7.1f}")
    lines.append(f"{'all':<22} {total:>7.1f}")
    table = folder / "evaluate" / "table.txt"
    if table.exists():
        lines += ["", table.read_text().rstrip()]
    protocol = (
        "; as in papers: slice_protocol.txt"
        if (table.parent / "slice_protocol.txt").exists()
        else ""
    )
    lines += [
        "",
        f"masks    {folder / 'segment' / 'masks'}/METHOD/PATIENT.nii.gz",
        f"scores   {folder / 'evaluate' / 'summary.json'} and cases.csv{protocol}",
        f"report   {folder / 'report' / 'report.html'}",
    ]
    if config.tracking.enabled:
        lines.append(f"tracking {_way_to_mlflow(config)}")
    return "\n".join(lines)


def print_results(config: Config, stage: Stage) -> None:
    """After a stage of its own: the results table where it made one, and where its outputs are."""
    if not processes().is_main:
        return
    folder = config.run_folder / stage.name
    if (folder / "table.txt").exists():
        print((folder / "table.txt").read_text())
    if (folder / "DONE").exists():
        print(f"{stage.name} is finished: {folder}")
    else:
        print(f"{stage.name}, part {config.cache.part}, is finished; others are missing: {folder}")


def _way_to_mlflow(config: Config) -> str:
    uri = store_uri(config)
    if uri:
        return f"mlflow ui --backend-store-uri {uri}"
    return f"cldf sync-tracking to=http://HOST:PORT runs={config.runs}"


def _say(text: str) -> None:
    if processes().is_main:
        print(text, file=sys.stderr, flush=True)
