"""DICOM Segmentation objects: a mask that viewers lay over the series it was drawn from."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydicom import Dataset
from pydicom.uid import generate_uid
from pydicom.valuerep import DA, TM

from cldf_dist.data.formats.dicom_slice import quiet, read_dataset
from cldf_dist.system.files import atomic_write

SOURCE_TAGS = (  # what a segmentation refers to its source by
    *("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID"),
    "FrameOfReferenceUID",
)
MAY_BE_EMPTY = (  # type 2 of the patient and study modules; PS3.3, C.7.1.1 and C.7.2.1
    *("PatientName", "PatientID", "PatientBirthDate", "PatientSex"),
    *("StudyDate", "StudyTime", "StudyID", "AccessionNumber", "ReferringPhysicianName"),
)
SEXES = ("M", "F", "O", "")
SERIES_NUMBER = 9000  # above the numbers that scanners give
LONGEST_LABEL = 64  # characters of a DICOM long string (LO)
ORGANS = {"liver": "Liver", "kidney": "Kidney", "kidneys": "Kidney", "spleen": "Spleen"}
LESIONS = ("tumour", "tumor", "lesion")
UTF_8 = "ISO_IR 192"


def write_dicom_seg(
    path: str | Path,
    mask: npt.NDArray[np.bool_],
    source_files: Sequence[str | Path],
    *,
    label: str,
    software_version: str,
) -> None:
    """Write a mask (x, y, slices) as a binary segmentation of the series it belongs to.

    `source_files` are the series' files in the order of the slices, as in `Series.files`; its
    patient, study and frame of reference are kept. One segment, called `label`. The same input
    gives the same UIDs, another mask others. The file appears whole or not at all. Raises
    ValueError where mask and files disagree or the files lack what a segmentation refers to.
    """
    path = Path(path)
    if path.suffix.lower() != ".dcm":
        raise ValueError(f"the file name must end in .dcm, got {path}")
    if not 0 < len(label) <= LONGEST_LABEL:
        raise ValueError(f"{path}: the label must have 1 to {LONGEST_LABEL} characters: {label!r}")
    files = [Path(file) for file in source_files]
    with quiet():
        sources = [_read_source(file) for file in files]
        _check_shape(mask, files, sources)
        segmentation = _segmentation(mask, files, sources, label, software_version)
        _save(segmentation, path)


def _read_source(file: Path) -> Dataset:
    """A header in memory, its missing and unusable type 2 elements emptied."""
    dataset = read_dataset(file)
    for keyword in SOURCE_TAGS:
        if not dataset.get(keyword):
            raise ValueError(
                f"{file}: {keyword} is missing, a segmentation refers to its source by it; "
                "take the original series, or write the mask as NIfTI"
            )
    for keyword in MAY_BE_EMPTY:
        if not _is_usable(dataset, keyword):
            setattr(dataset, keyword, "")
    return dataset


def _is_usable(dataset: Dataset, keyword: str) -> bool:
    try:
        value = dataset[keyword].value
        if keyword == "PatientSex":
            return value in SEXES
        if keyword.endswith("Date"):
            DA(value)
        elif keyword.endswith("Time"):
            TM(value)
    except (KeyError, TypeError, ValueError):
        return False
    return value is not None


def _check_shape(mask: npt.NDArray[np.bool_], files: list[Path], sources: list[Dataset]) -> None:
    if mask.ndim != 3 or mask.dtype != np.bool_:
        raise ValueError(
            f"the mask must be bool (x, y, slices), got {mask.dtype} of shape {mask.shape}"
        )
    if mask.shape[2] != len(files) or not files:
        raise ValueError(
            f"the mask has {mask.shape[2]} slices, its series {len(files)} files; "
            "give the files of all slices, in their order"
        )
    for file, source in zip(files, sources, strict=True):
        expected = (source.get("Columns"), source.get("Rows"))
        if mask.shape[:2] != expected:
            raise ValueError(
                f"{file} has {expected[0]} columns and {expected[1]} rows, the mask "
                f"{mask.shape[0]} and {mask.shape[1]}; give the series that it was drawn from"
            )


def _segmentation(
    mask: npt.NDArray[np.bool_],
    files: list[Path],
    sources: list[Dataset],
    label: str,
    software_version: str,
) -> Any:
    from highdicom.seg import Segmentation, SegmentationTypeValues  # takes a while

    content = hashlib.sha256(np.packbits(mask).tobytes()).hexdigest()
    instances = [str(source.SOPInstanceUID) for source in sources]
    entropy = [label, software_version, str(mask.shape), content, *instances]
    _decode(sources[0])
    name = sources[0].PatientName
    sources[0].PatientName = ""  # highdicom prints names that it finds unusual
    try:
        segmentation = Segmentation(
            source_images=sources,
            pixel_array=mask.T.astype(np.uint8),  # (slices, rows, columns)
            segmentation_type=SegmentationTypeValues.BINARY,
            segment_descriptions=[_description(label, software_version)],
            series_instance_uid=generate_uid(entropy_srcs=["series", *entropy]),
            series_number=SERIES_NUMBER,
            sop_instance_uid=generate_uid(entropy_srcs=["instance", *entropy]),
            instance_number=1,
            manufacturer="CLDF",
            manufacturer_model_name="cldf_dist",
            software_versions=software_version,
            device_serial_number="none",
            content_label="CLDF",
            series_description=f"CLDF: {label}"[:LONGEST_LABEL],
            omit_empty_frames=bool(mask.any()),  # an object without frames is not valid
            specific_character_set=UTF_8,
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{files[0].parent} cannot be referred to by a segmentation: {reason}; "
            "take the original series, or write the mask as NIfTI"
        ) from error
    segmentation.PatientName = name
    segmentation.ContentCreatorName = ""  # type 2, left out by highdicom
    _name_dimensions(segmentation, str(generate_uid(entropy_srcs=["dimensions", *entropy])))
    return segmentation


def _decode(source: Dataset) -> None:
    """Bring text in sequences to Unicode too, and drop what is damaged: it would be copied."""
    for tag in list(source.keys()):
        try:
            element = source[tag]
            for item in element.value if element.VR == "SQ" else ():
                item.decode()
        except Exception:  # elements are parsed here, and each kind fails in its own way
            del source[tag]


def _description(label: str, software_version: str) -> Any:
    from highdicom import AlgorithmIdentificationSequence
    from highdicom.seg import SegmentAlgorithmTypeValues, SegmentDescription
    from pydicom.sr.codedict import codes

    words = label.lower().split()
    organs = [ORGANS[word] for word in words if word in ORGANS]
    if any(word.rstrip("s") in LESIONS for word in words):
        category, kind = codes.SCT.MorphologicallyAbnormalStructure, codes.SCT.Lesion
    elif organs:
        category, kind = codes.SCT.AnatomicalStructure, getattr(codes.SCT, organs[0])
    else:
        category, kind = codes.SCT.Tissue, codes.SCT.Tissue
    return SegmentDescription(
        segment_number=1,
        segment_label=label,
        segmented_property_category=category,
        segmented_property_type=kind,
        algorithm_type=SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=AlgorithmIdentificationSequence(
            name="CLDF", family=codes.cid7162.ArtificialIntelligence, version=software_version
        ),
    )


def _name_dimensions(segmentation: Dataset, uid: str) -> None:
    """Replace the one UID that highdicom draws at random."""
    for item in (*segmentation.DimensionOrganizationSequence, *segmentation.DimensionIndexSequence):
        item.DimensionOrganizationUID = uid


def _save(segmentation: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        segmentation.save_as(file)
