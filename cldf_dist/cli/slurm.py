"""Answers for the batch scripts, one a line: `python -m cldf_dist.cli.slurm done|chain WORDS`.

`done STAGE CONFIG [...]` prints the file that says that a stage (or a part of it) is finished, one
for each object; nothing where only the exit code counts. `chain PARTS CONFIG [...]` prints a line
for each stage: its name, finished or to-do, all-nodes or one-node, the array of its parts (or -),
and the stages that it needs. Imports no torch.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from cldf_dist.config import EACH, Config, load
from cldf_dist.runs.run import DONE
from cldf_dist.stages import STAGES, part_folder, stage_named


def main(words: Sequence[str]) -> int:
    """Answer on stdout; 1, with the reason, where the question is wrong."""
    try:
        kind, what, *rest = words
        print(done_files(what, rest) if kind == "done" else chain(int(what), rest))
    except (ValueError, OSError) as error:
        print(f"cldf: error: {error}", file=sys.stderr)
        return 1
    return 0


def done_files(name: str, words: Sequence[str]) -> str:
    """The file that a finished stage leaves, for each object; "" for the doctor and new scans."""
    if name == "doctor":
        return ""
    stage = STAGES[-1] if name == "run" else stage_named(name)
    config = _config(words, "" if name == "run" else stage.fit_section)
    if config.input:
        return ""
    return "\n".join(
        str(part.run_folder / part_folder(stage, part) / DONE) for part in _per_object(config)
    )


def chain(num_parts: int, words: Sequence[str]) -> str:
    """One line for each stage, finished where it is for every object; the cache is made in
    `num_parts` parts, of which those that are not finished are listed."""
    config = _config(words, "")
    if config.input:
        raise ValueError("input= is for one stage: sbatch slurm/stage.sbatch segment ...")
    folders = [part.run_folder for part in _per_object(config)]
    lines = []
    for stage in STAGES:
        finished = all((folder / stage.name / DONE).is_file() for folder in folders)
        state = "finished" if finished else "to-do"
        nodes = "all-nodes" if stage.distributed else "one-node"
        array = "-"
        if stage.name == "cache" and num_parts > 1 and not finished:
            array = _missing_parts(folders, num_parts)
        lines.append(" ".join((stage.name, state, nodes, array, *stage.needs)))
    return "\n".join(lines)


def _per_object(config: Config) -> list[Config]:
    if config.data.object != EACH and "," not in config.data.object:
        return [config]
    from cldf_dist.cli.multi_object import one_per_object

    return one_per_object(config)


def _missing_parts(folders: Sequence[Path], num_parts: int) -> str:
    """The numbers of the parts that are not finished, as sbatch --array takes them."""
    missing = [
        str(number)
        for number in range(1, num_parts + 1)
        if not all(
            (folder / "cache" / "parts" / f"{number}-of-{num_parts}" / DONE).is_file()
            for folder in folders
        )
    ]
    return ",".join(missing) or "-"


def _config(words: Sequence[str], fit_section: str) -> Config:
    files = [word for word in words if "=" not in word]
    settings = [word for word in words if "=" in word]
    return load(files, settings, fit_section=fit_section)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
