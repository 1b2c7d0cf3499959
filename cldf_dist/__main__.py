"""The command line: `cldf STAGE CONFIG [CONFIG ...] [key=value ...]`."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from cldf_dist import __version__
from cldf_dist.config import Config, load
from cldf_dist.stages import STAGES, Stage, stage_named

DOCTOR, SYNC, STUDY = "doctor", "sync-tracking", "study"
EPILOG = """\
stages, in order:
{stages}
  run                    all stages; finished ones are skipped
  study                  runs of several experiments and seeds, and their tables: takes a study file
  doctor                 check that everything a run needs works, on all processes of the launch
  sync-tracking          send the metrics of all runs in a folder to MLflow: to=http://HOST:PORT

examples:
  cldf run configs/demo.yaml
  cldf train-diffusion configs/brats.yaml configs/small.yaml data.root=/data/brats fit.steps=2000
  cldf segment configs/brats.yaml input=/data/new_scans output=masks
  accelerate launch --config_file configs/accelerate/ddp.yaml -m cldf_dist run configs/brats.yaml

  cldf doctor configs/brats.yaml data.root=/data/brats
  cldf study configs/study.yaml experiments.brats2021.needs=/data/brats

Later files override earlier ones, key=value overrides files. To resume, run the same command again.
"""


def command() -> NoReturn:
    """The program, in a process of its own."""
    from cldf_dist.system.process_end import end_process

    if signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN:
        # slurm/stage.sbatch ignores it for the launcher's sake; we end, or save first in a training
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    end_process(main(own_process=True))


def main(arguments: Sequence[str] | None = None, *, own_process: bool = False) -> int:
    """Run what the command line says; the process's exit code."""
    parser = _parser()
    options = parser.parse_intermixed_args(arguments)
    if not options.words and options.stage not in (DOCTOR, SYNC):
        parser.error("the following arguments are required: CONFIG|key=value")
    try:
        if options.stage == STUDY:
            from cldf_dist.study import command

            return command.conduct_study(
                options.words, dry=options.dry_run, tables_only=options.tables_only
            )
        if options.tables_only:
            raise ValueError(f"--tables-only is for study, not for {options.stage}")
        return _run(options.stage, options.words, options.dry_run, own_process)
    except (ValueError, OSError, RuntimeError, FloatingPointError, MemoryError) as error:
        if os.environ.get("CLDF_TRACEBACK"):
            raise
        said = " ".join(line.strip() for line in str(error).splitlines())  # those of libraries
        print(f"cldf: error: {said or type(error).__name__}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("cldf: interrupted; the same command resumes", file=sys.stderr)
        return 128 + signal.SIGINT


def _parser() -> argparse.ArgumentParser:
    stages = "\n".join(f"  {stage.name:<22} {stage.does}" for stage in STAGES)
    parser = argparse.ArgumentParser(
        prog="cldf",
        description="CLDF: medical image segmentation from image-level labels.",
        epilog=EPILOG.format(stages=stages),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "stage", metavar="STAGE", help="a stage's name, run, study, doctor or sync-tracking"
    )
    parser.add_argument(
        "words", metavar="CONFIG|key=value", nargs="*", help="YAML files, then settings"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print settings, inputs, outputs and sizes; exit"
    )
    parser.add_argument(
        "--tables-only", action="store_true", help="study: make its tables anew, run nothing"
    )
    parser.add_argument("--version", action="version", version=f"cldf {__version__}")
    return parser


def _run(name: str, words: Sequence[str], dry: bool, own_process: bool) -> int:
    if name == DOCTOR:
        from cldf_dist.doctor.examination import examine

        return examine(_config_of_doctor(words))
    if name == SYNC:
        from cldf_dist.runs import sync_tracking

        if dry:
            raise ValueError("--dry-run is for stages, not for sync-tracking")
        return sync_tracking.run(words)
    stages = STAGES if name == "run" else (stage_named(name),)
    files = [word for word in words if "=" not in word]
    settings = [word for word in words if "=" in word]
    config = load(files, settings, fit_section=stages[0].fit_section if len(stages) == 1 else "")
    _check_new_scans(name, config)
    if config.cache.part and name != "cache":
        raise ValueError(f"cache.part is for the cache stage, not for {name}")
    if own_process:
        from cldf_dist.system.monai_import import import_monai_quickly

        import_monai_quickly()
    from cldf_dist.cli import pipeline
    from cldf_dist.cli.multi_object import one_per_object

    parts = one_per_object(config)
    if dry:
        for part in parts:
            print(pipeline.dry_run(part, stages))
        return 0
    if config.input:
        return _segment_new(config, parts)
    return _run_parts(config, parts, stages, name)


def _config_of_doctor(words: Sequence[str]) -> Config:
    """The settings; without any the defaults, with the phantom for data."""
    files = [word for word in words if "=" not in word]
    settings = [word for word in words if "=" in word]
    if not files:
        settings = ["data.dataset=phantom", *settings]
    return load(files, settings)


def _segment_new(config: Config, parts: Sequence[Config]) -> int:
    """New scans are dealt out to the processes; the main one prints what came of them."""
    from cldf_dist.cli.multi_object import merge_new_scans
    from cldf_dist.cli.new_scans import segment_new
    from cldf_dist.system.distributed import fail_on_all_ranks, gather_objects, processes

    with fail_on_all_ranks():
        mine = [segment_new(part, Path(config.output)) for part in parts]
    results = [
        result for shares in gather_objects(mine) for result in shares
    ]  # by process, by part
    files = [path for written, _ in results for path in written]
    failed = [sentence for _, sentences in results for sentence in sentences]
    with fail_on_all_ranks():
        if processes().is_main and len(parts) > 1:
            of_parts = [results[number :: len(parts)] for number in range(len(parts))]
            written = [[path for found, _ in shares for path in found] for shares in of_parts]
            files += merge_new_scans(config, parts, written)
    if processes().is_main:
        for path in sorted(files):
            print(path)
        for sentence in sorted(failed):
            print(f"cldf: error: {sentence}", file=sys.stderr)
    return 1 if failed else 0


def _run_parts(config: Config, parts: Sequence[Config], stages: Sequence[Stage], name: str) -> int:
    from cldf_dist.cli.multi_object import merge_runs, with_one_split
    from cldf_dist.system.distributed import processes
    from cldf_dist.system.signals import Stopped

    try:
        for part in with_one_split(config, parts):
            _run_stages(part, stages, name)
    except Stopped as stop:
        print(f"cldf: {stop}; the same command resumes", file=sys.stderr)
        # under a launcher a rank that was asked to stop has done its duty: DONE tells the rest
        return 0 if processes().world_size > 1 else 128 + stop.number
    if len(parts) > 1 and stage_named("segment") in stages and processes().is_main:
        folder = merge_runs(config, parts)
        print(f"masks    {folder / 'masks'}/PATIENT.nii.gz, {folder / 'labels.json'}")
    return 0


def _run_stages(config: Config, stages: Sequence[Stage], name: str) -> None:
    from cldf_dist.cli import pipeline

    if name == "run":
        pipeline.run_all(config)
    else:
        pipeline.run_stage(config, stages[0])
        pipeline.print_results(config, stages[0])


def _check_new_scans(name: str, config: Config) -> None:
    if bool(config.input) != bool(config.output):
        raise ValueError("input= and output= belong together: the new scans, and their masks")
    if config.input and name != "segment":
        raise ValueError(f"input= is for the segment stage, not for {name}")


if __name__ == "__main__":
    command()
