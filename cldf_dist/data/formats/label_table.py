"""A CSV file of image-level labels, of slices or of whole volumes: `data.labels`.

The header is `patient,slice,<object>[,<object> ...]`, or without `slice` for labels of volumes; the
columns may stand in any order, separated by commas, semicolons or tabs. A value is 1 where the
object is in the slice (or volume), 0 where it is not, empty where nobody knows. What is not listed
is unknown too. A volume's 0 holds for all its slices. Its 1 is given to all its slices as well,
which is wrong for those beside the object: all that is known, and worse than labels of slices.
"""

import csv
import io
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import nibabel as nib
import numpy as np
import numpy.typing as npt

from cldf_dist.data.formats.nifti import Affine
from cldf_dist.data.readers.objects import object_names
from cldf_dist.labels import SliceLabel

PATIENT, SLICE = "patient", "slice"  # columns; every other one is an object
DELIMITERS = (",", ";", "\t")
# a column with gaps is often saved as decimal numbers
VALUES = {
    "1": SliceLabel.POSITIVE,
    "1.0": SliceLabel.POSITIVE,
    "0": SliceLabel.NEGATIVE,
    "0.0": SliceLabel.NEGATIVE,
    "": SliceLabel.UNLABELLED,
}
NAMES_SHOWN = 5  # in one error


@dataclass(frozen=True)
class Row:
    """The labels of one line of a label table."""

    line: int  # of the file, from 1
    values: tuple[int, ...]  # per object: 1, 0 or -2


@dataclass(frozen=True)
class LabelTable:
    """The labels of a file, as they are written there."""

    path: Path
    objects: tuple[str, ...]
    has_slices: bool
    rows: Mapping[str, Mapping[str, Row]]  # by patient, then by slice ("" for the volume)

    def named_slices(self, patient: str) -> tuple[str, ...]:
        """The names of a patient's slices in the file; none for labels of volumes."""
        return tuple(self.rows.get(patient, ())) if self.has_slices else ()

    def object_names(self, object_name: str) -> tuple[str, ...]:
        """The columns that `data.object` names, the only one where it is empty."""
        usual = self.objects[0] if len(self.objects) == 1 else ""
        try:
            return object_names(object_name, self.objects, usual=usual)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from error

    def slice_labels(
        self, patient: str, slices: int | Sequence[Collection[str]], object_name: str
    ) -> npt.NDArray[np.int8]:
        """Per slice: 1 if any part of the object is there, 0 if none is, -2 if that is unknown.

        `slices` is how many there are, called 0, 1, ..., or all the names that each goes by.
        Raises ValueError, with the line, for a row that names no slice or one that has a row.
        """
        columns = [self.objects.index(part) for part in self.object_names(object_name)]
        names = [{str(number)} for number in range(slices)] if isinstance(slices, int) else slices
        labels = np.full(len(names), SliceLabel.UNLABELLED, np.int8)
        places = _places(names)
        lines: dict[int, int] = {}
        for name, row in self.rows.get(patient, {}).items():
            label = _joined([row.values[column] for column in columns])
            if not self.has_slices:
                labels[:] = label
                break
            found = places.get(name) or places.get(name.lstrip("0") or "0", [])
            if len(found) != 1:
                what = f"{self.path}, line {row.line}: patient {patient}"
                raise ValueError(f"{what} {_not_one_slice(name, found, names)}")
            if found[0] in lines:
                raise ValueError(
                    f"{self.path}, lines {lines[found[0]]} and {row.line}: both are of the same "
                    f"slice of patient {patient}, {name!r}; keep one"
                )
            lines[found[0]], labels[found[0]] = row.line, label
        return labels

    def check_patients(self, known: Collection[str]) -> None:
        """Raise ValueError for rows that name patients whom the data set does not have."""
        strange = [
            f"{name!r} (line {min(row.line for row in rows.values())})"
            for name, rows in self.rows.items()
            if name not in known
        ]
        if strange:
            more = len(strange) - NAMES_SHOWN
            raise ValueError(
                f"{self.path}: not in the data: {', '.join(strange[:NAMES_SHOWN])}"
                + (f" and {more} more" if more > 0 else "")
                + "; the patients must be called as in the data (spreadsheets drop leading zeros)"
            )


def read_labels(path: str | Path) -> LabelTable:
    """The table of a CSV file.

    Raises ValueError, with the line, for a header without `patient` or an object, values other
    than 0, 1 and empty, and rows that say something twice.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"data.labels: {path} does not exist; expected {_expected()}")
    stat = path.stat()
    return _read(path, stat.st_size, stat.st_mtime_ns)


def axis_to_head(affine: Affine) -> int:
    """The axis of the file that runs to the head or to the feet: slices are numbered along it."""
    orientation = nib.orientations.io_orientation(affine)
    return int(np.flatnonzero(orientation[:, 0] == 2)[0])


@lru_cache(maxsize=1)  # each patient asks for it
def _read(path: Path, size: int, changed: int) -> LabelTable:
    records = _records(_text(path), path)
    header = next(records, (1, []))[1]
    objects = _objects(header, path)
    patient_column = header.index(PATIENT)
    slice_column = header.index(SLICE) if SLICE in header else None
    object_columns = [header.index(name) for name in objects]
    rows: dict[str, dict[str, Row]] = {}
    for line, cells in records:
        where = f"{path}, line {line}"
        if len(cells) != len(header):
            raise ValueError(f"{where}: must have {len(header)} columns, got {len(cells)}")
        patient = cells[patient_column]
        name = "" if slice_column is None else cells[slice_column]
        if not patient or (slice_column is not None and not name):
            missing = SLICE if patient else PATIENT
            raise ValueError(f"{where}: {missing} is empty; every row must name one")
        for column in object_columns:
            if cells[column] not in VALUES:
                raise ValueError(
                    f"{where}: {header[column]} must be 0, 1 or empty (unknown), "
                    f"got {cells[column]!r}"
                )
        listed = rows.setdefault(patient, {})
        if name in listed:
            what = f"slice {name!r} of patient {patient}" if name else f"patient {patient}"
            raise ValueError(f"{where}: {what} is already in line {listed[name].line}; keep one")
        listed[name] = Row(line, tuple(VALUES[cells[column]] for column in object_columns))
    if not rows:
        raise ValueError(f"{path} has no rows; expected {_expected()}")
    return LabelTable(path, objects, slice_column is not None, rows)


def _text(path: Path) -> str:
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(
            f"{path}, line {line}: not UTF-8; save it as CSV UTF-8 (a choice of Excel's)"
        ) from error


def _records(text: str, path: Path) -> Iterator[tuple[int, list[str]]]:
    """Line number and cells of every row that is not empty."""
    header = next((line for line in text.splitlines() if line.strip()), "")
    delimiter = max(DELIMITERS, key=header.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        for row in reader:
            cells = [cell.strip() for cell in row]
            if any(cells):
                yield reader.line_num, cells
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: not CSV: {error}") from error


def _objects(header: Sequence[str], path: Path) -> tuple[str, ...]:
    objects = tuple(name for name in header if name not in (PATIENT, SLICE))
    if PATIENT not in header or not objects:
        got = ",".join(header) or "an empty file"
        raise ValueError(f"{path}, line 1: expected {_expected()}; got {got}")
    doubled = {name for name in header if header.count(name) > 1}
    if "" in header or doubled:
        what = f"the column {min(doubled)!r} is there twice" if doubled else "a column has no name"
        raise ValueError(f"{path}, line 1: {what}; remove it")
    joining = [name for name in objects if "+" in name or "," in name]
    if joining:
        raise ValueError(
            f"{path}, line 1: objects must have no '+' or ',' in their names, got {joining}"
        )
    return objects


def _expected() -> str:
    return f"the header {PATIENT},{SLICE},OBJECT or {PATIENT},OBJECT, then a row per label"


def _joined(labels: Sequence[int]) -> int:
    if SliceLabel.POSITIVE in labels:
        return SliceLabel.POSITIVE
    return (
        SliceLabel.NEGATIVE
        if all(label == SliceLabel.NEGATIVE for label in labels)
        else SliceLabel.UNLABELLED
    )


def _places(names: Sequence[Collection[str]]) -> dict[str, list[int]]:
    """The slices that go by each name."""
    places: dict[str, list[int]] = {}
    for index, aliases in enumerate(names):
        for name in set(aliases):
            places.setdefault(name, []).append(index)
    return places


def _not_one_slice(name: str, found: Sequence[int], names: Sequence[Collection[str]]) -> str:
    if found:
        return (
            f"has {len(found)} slices that go by {name!r}; "
            "name the file with its folder, or the SOPInstanceUID"
        )
    first, last = (min(names[index], key=len) for index in (0, -1))
    return f"has no slice {name!r}; its {len(names)} slices go by {first!r} to {last!r}"
