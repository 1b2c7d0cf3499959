"""The patient-level split: random and balanced, or read from a file."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from cldf_dist.system.seeding import sample_seed

SPLITS = ("train", "validation", "test")
NAMED = 5  # patients, in an error
FORM = '{"train": [patient, ...], "validation": [...], "test": [...]}'


def split_patients(
    patients: Mapping[str, float],
    validation_fraction: float,
    test_fraction: float,
    seed: int,
) -> dict[str, list[str]]:
    """The patients of each split, balanced in the value of `patients`.

    The value of a patient is, for example, its fraction of positive slices. Patients are sorted
    into terciles of it and shuffled within each; the held-out ones are taken at even distances. The
    order of `patients` does not matter. Raises ValueError where a split would be empty.
    """
    for name, value in (("validation", validation_fraction), ("test", test_fraction)):
        if not 0 <= value < 1:
            raise ValueError(f"data.{name}_fraction must be in [0, 1), got {value}")
    by_chance = sorted(patients, key=lambda name: _chance(name, seed))
    by_value = sorted(by_chance, key=lambda name: patients[name])
    tercile = {name: 3 * rank // len(by_value) for rank, name in enumerate(by_value)}
    ordered = sorted(by_chance, key=lambda name: tercile[name])
    num_test = _held_out(len(ordered), test_fraction)
    num_validation = _held_out(len(ordered), validation_fraction)
    if len(ordered) <= num_test + num_validation:
        raise ValueError(
            f"{len(ordered)} patients are too few for {num_validation} validation and {num_test} "
            f"test patients; add patients or lower data.validation_fraction and data.test_fraction"
        )
    test = _evenly(ordered, num_test)
    rest = [name for name in ordered if name not in test]
    validation = _evenly(rest, num_validation)
    train = [name for name in rest if name not in validation]
    return {"train": sorted(train), "validation": sorted(validation), "test": sorted(test)}


def read_splits(path: str | Path, patients: Sequence[str]) -> dict[str, list[str]]:
    """The split of a JSON file {"train": [patient, ...], "validation": [...], "test": [...]}.

    Raises ValueError unless each of `patients`, and nobody else, is in exactly one split.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"data.splits: {path} does not exist or is a folder; expected {FORM}"
        )
    try:
        splits = json.loads(path.read_text("utf-8-sig"))  # some editors put a mark before the text
    except UnicodeDecodeError:
        raise ValueError(f"data.splits: {path} is not UTF-8 text; save it as such") from None
    except ValueError as error:
        raise ValueError(f"data.splits: {path} is not JSON: {error}; expected {FORM}") from error
    if not isinstance(splits, dict) or sorted(splits) != sorted(SPLITS):
        got = ", ".join(map(repr, splits)) if isinstance(splits, dict) else type(splits).__name__
        raise ValueError(
            f"data.splits: {path} must have exactly the keys {', '.join(SPLITS)}, got "
            f"{got or 'none'}; expected {FORM}"
        )
    for split, names in splits.items():
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"data.splits: {split!r} of {path} must be a list of patient names")
        if not names:
            raise ValueError(f"data.splits: {split!r} of {path} has no patients")
    listed = [name for split in SPLITS for name in splits[split]]
    problems = {
        "listed more than once": {name for name in listed if listed.count(name) > 1},
        "not in the data": set(listed) - set(patients),
        "missing from the file": set(patients) - set(listed),
    }
    found = [f"{what}: {_some(names)}" for what, names in problems.items() if names]
    if found:
        raise ValueError(
            f"data.splits: {path} must list every patient once; {'; '.join(found)}; change the "
            "list or the data"
        )
    return {split: list(splits[split]) for split in SPLITS}


def _some(names: set[str]) -> str:
    """The first names, and the number of the others, as text."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(sorted(names)[:NAMED]) + more


def _chance(name: str, seed: int) -> int:
    return sample_seed(seed, 0, f"split {name}")


def _held_out(num_patients: int, fraction: float) -> int:
    return max(1, round(num_patients * fraction)) if fraction > 0 else 0


def _evenly(names: list[str], count: int) -> set[str]:
    """`count` of the names, at even distances."""
    return {names[int((number + 0.5) * len(names) / count)] for number in range(count)}
