"""New scans, segmented by a finished run: from the command line, or from Python.



segmenter = load_segmenter("runs/brats")
result = segmenter.segment("scans/patient_7")
result.mask, result.probability, result.affine
result.save("masks")
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np
import numpy.typing as npt

from cldf_dist.config import Config, check
from cldf_dist.data.formats.nifti import Affine, Volume, check_affine, write_nifti
from cldf_dist.data.readers.body_mask import body_mask_of, body_mask_rule
from cldf_dist.data.readers.new_scans import Scan, ScanKind, find_scans
from cldf_dist.data.readers.objects import object_title
from cldf_dist.data.shards.table import ShardSet
from cldf_dist.data.slices import Geometry, prepare_volume
from cldf_dist.inference.segmenter import Segmenter
from cldf_dist.methods import METHODS
from cldf_dist.runs.run import Run, changed_keys, read_config, read_json, room_explained
from cldf_dist.scoring.masks import FloatArray, Mask, mask_and_probability, write_own_layout
from cldf_dist.stages import stage_named
from cldf_dist.system.distributed import processes
from cldf_dist.system.progress import progress

KEY_UNFIT, LONGEST_KEY = re.compile(r"[^A-Za-z0-9_-]"), 50  # of the names of slices
# settings that are about the scans at hand, not about the trained run
OF_NEW_SCANS = (
    "segment.batch_size", "segment.tile_pixels", "segment.gate_probability",
    "segment.min_component_ml",
)  # fmt: skip


@dataclass(frozen=True)
class Segmentation:
    """The segmentation of one scan, on the scan's own grid."""

    name: str
    mask: Mask  # (x, y, slices)
    probability: FloatArray  # (x, y, slices) in [0, 1]; 0.5 at the threshold
    affine: Affine  # (4, 4), voxel index to mm
    slice_probability: FloatArray  # (slices,) p(object) by the classifiers; nan where not prepared
    config: Config
    geometry: Geometry
    dicom_files: tuple[Path, ...] = ()

    def save(self, folder: str | Path) -> list[Path]:
        """Write mask and probability as NIfTI; the mask also in CHAOS's own layout where the scan
        came in that, and as DICOM-SEG where it came as DICOM. Returns the files of the mask.

        Raises ValueError where no DICOM-SEG can be made; the NIfTI files are there all the same.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_nifti(folder / f"{self.name}_probability.nii.gz", self.probability, self.affine)
        write_own_layout(folder / "chaos", self.mask, self.geometry, self.config.data)
        mask = folder / f"{self.name}_mask.nii.gz"
        write_nifti(mask, self.mask, self.affine)
        return [mask, self._save_dicom_seg(folder)] if self.dicom_files else [mask]

    def _save_dicom_seg(self, folder: Path) -> Path:
        from cldf_dist.data.formats.dicom_seg import LONGEST_LABEL, write_dicom_seg

        path = folder / f"{self.name}_seg.dcm"
        label = object_title(self.config.data)[:LONGEST_LABEL]
        software = version("cldf-dist")
        try:
            write_dicom_seg(
                path, self.mask, self.dicom_files, label=label, software_version=software
            )
        except ValueError as error:
            raise ValueError(
                f"the mask is there as NIfTI, but cannot be made a DICOM-SEG: {error}"
            ) from error
        return path


@dataclass(frozen=True)
class ScanSegmenter:
    """The trained nets of a run, ready for scans that it has never seen."""

    config: Config
    kind: ScanKind
    method: str  # whose masks they get
    threshold: float
    nets: Segmenter

    @property
    def channels(self) -> tuple[str, ...]:
        """The channels that a scan must have, in this order."""
        return self.kind.channels

    def find(self, path: str | Path, *, leave_out: Path | None = None) -> list[Scan]:
        """The scans at `path`; see `data.new_scans.find_scans`."""
        return find_scans(path, self.kind, leave_out=leave_out)

    def segment(self, path: str | Path) -> Segmentation:
        """The one scan at `path`: a NIfTI file, a DICOM folder, or a folder of the training data's
        layout. ValueError where there are several."""
        scans = self.find(path)
        if len(scans) != 1:
            names = ", ".join(scan.name for scan in scans[:5])
            raise ValueError(f"{path} holds {len(scans)} scans ({names}); use segment_all")
        return self.segment_scan(scans[0])

    def segment_all(self, path: str | Path) -> Iterator[Segmentation]:
        """All scans at `path`, one after the other."""
        for scan in self.find(path):
            yield self.segment_scan(scan)

    def segment_array(
        self, image: npt.NDArray[np.number], affine: Affine, *, name: str = "scan"
    ) -> Segmentation:
        """An image (channels, x, y, slices), channels as `self.channels`, and its affine (4, 4)
        from voxel index to mm in RAS+, as NIfTI has it."""
        image = np.asarray(image)
        if image.ndim != 4 or len(image) != len(self.channels):
            raise ValueError(
                f"{name}: the image must be (channels, x, y, slices) with the channels "
                f"{', '.join(self.channels)}, got shape {image.shape}"
            )
        if image.dtype.kind not in "iuf" or not np.isfinite(image).all():
            raise ValueError(f"{name}: the image must be finite numbers, got {image.dtype}")
        hounsfield = self.kind.hounsfield
        inside = body_mask_of(image, body_mask_rule(self.config.data), hounsfield=hounsfield)
        affine = check_affine(np.asarray(affine, np.float64), name)
        return self.segment_volume(Volume(name, image, inside, None, affine, hounsfield=hounsfield))

    def segment_scan(self, scan: Scan) -> Segmentation:
        """One of the scans that `find` found."""
        return self.segment_volume(dataclasses.replace(scan.read(), patient=scan.name))

    def segment_volume(self, volume: Volume) -> Segmentation:
        """A scan that was read already; its mask, if it has one, is not looked at."""
        config = self.config
        key = KEY_UNFIT.sub("_", volume.patient)[:LONGEST_KEY]  # files may have any name
        anonymous = dataclasses.replace(volume, patient=key, mask=None, slice_labels=None)
        slices, geometry = prepare_volume(anonymous, config.data)
        if not slices:
            raise ValueError(
                f"{volume.patient}: no slice shows enough of the body (data.min_body_fraction)"
            )
        images = np.stack([item.image for item in slices])
        keys = [item.key for item in slices]
        scores = self.nets.score(key, keys, images, methods=(self.method,))
        mask, probability = mask_and_probability(
            config, scores, self.method, geometry, self.threshold
        )
        certainty = np.full(_num_slices(geometry), np.nan, np.float32)
        certainty[list(geometry.indices)] = scores.probability
        return Segmentation(
            name=volume.patient,
            mask=mask,
            probability=probability,
            affine=volume.affine,
            slice_probability=certainty,
            config=config,
            geometry=geometry,
            dicom_files=volume.dicom_files,
        )


def load_segmenter(
    run_folder: str | Path,
    *,
    gate_probability: float | None = None,
    min_component_ml: float | None = None,
    batch_size: int | None = None,
) -> ScanSegmenter:
    """The segmenter of a finished run, from its folder such as `runs/brats`.

    Slices that the classifiers put below `gate_probability` are emptied (0: none is); components
    below `min_component_ml` are removed. Without a value the run's own settings count. Raises
    FileNotFoundError where the run is not finished up to its segment stage.
    """
    folder = Path(run_folder).absolute()
    if not (folder / "segment").is_dir():
        below = sorted(str(stage.parent) for stage in folder.glob("*/segment"))
        hint = f"name one of its runs: {', '.join(below)}" if below else "run: cldf run CONFIG"
        raise FileNotFoundError(f"{folder} holds no segment stage; {hint}")
    made = read_config(folder / "segment" / "config.yaml")
    own = made.segment
    segment = dataclasses.replace(
        own,
        gate_probability=own.gate_probability if gate_probability is None else gate_probability,
        min_component_ml=own.min_component_ml if min_component_ml is None else min_component_ml,
        batch_size=own.batch_size if batch_size is None else batch_size,
    )
    config = dataclasses.replace(
        made, runs=str(folder.parent), name=folder.name, segment=segment, input="-", output="-"
    )
    check(config)
    return _loaded(config)


def segment_new(config: Config, leave_out: Path) -> tuple[list[Path], list[str]]:
    """Masks for this process's part of the new scans at config.input, written to config.output.

    The run's own settings count, those of the command line must not contradict them. Scans in
    `leave_out`, the folder of all outputs, are not looked at. Returns the masks written, and one
    sentence for each scan that could not be segmented.
    """
    output = Path(config.output)
    segmenter = _loaded(_settings_of_run(config))
    scans = segmenter.find(config.input, leave_out=leave_out.absolute())
    _check_output(output, Path(config.input))
    written, failed = [], []
    mine = scans[processes().rank :: processes().world_size]
    with progress("segment", len(mine), "scans", shown=processes().is_main) as bar:
        for scan in mine:
            try:
                found = segmenter.segment_scan(scan)
            except (ValueError, OSError) as error:
                failed.append(f"{scan.name}: {error}")
                continue
            try:
                with room_explained(output):  # a full disk stops everything
                    written += found.save(output)
            except ValueError as error:
                failed.append(f"{scan.name}: {error}")
            bar.advance(note=scan.name)
    return written, failed


def _check_output(output: Path, scans: Path) -> None:
    """Raise before the work where it could not be kept."""
    if output.absolute() == scans.absolute():
        raise ValueError(f"output={output} must not be the folder of the scans; name another")
    try:
        output.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=output):
            pass
    except OSError as error:
        raise OSError(
            f"output={output} must be a folder that can be written: {error.strerror}; name another"
        ) from error


def _loaded(config: Config) -> ScanSegmenter:
    run = Run(config, "segment", ())
    folder = run.needs("segment")
    rule = read_json(folder / "thresholds.json")
    method = rule["mask_method"]
    prepared = ShardSet(run.needs("prepare"), on_damaged="skip")
    seen = prepared.geometry(prepared.patients["train"][0])
    kind = ScanKind(config.data, tuple(prepared.manifest["channels"]), seen.hounsfield)
    return ScanSegmenter(
        config, kind, method, rule["thresholds"][method], Segmenter.load(config, run)
    )


def _settings_of_run(config: Config) -> Config:
    """The settings that the nets were trained with; ValueError where `config` differs."""
    folder = Run(config, "segment", ()).needs("segment")
    made = read_config(folder / "config.yaml")
    free = (
        *(f"{key}=" for key in OF_NEW_SCANS),
        "data.root=",
        "data.shards=",
        "data.dataset=",
        "data.labels=",
        "seeds.cam=",  # no mask of a new scan needs it, nor a baseline's settings
        *(f"{method.section}." for method in METHODS if method.section),
    )
    changed = [
        change
        for change in changed_keys(made, config, stage_named("segment").all_sections)
        if not change.startswith(free)
    ]
    if changed:
        raise ValueError(
            f"{folder} was made with {'; '.join(changed[:3])}; new scans are segmented with the "
            "settings of the run: leave them out, or name another run"
        )
    return dataclasses.replace(made, runs=config.runs, name=config.name, segment=config.segment)


def _num_slices(geometry: Geometry) -> int:
    """Slices of the scan along the axis to the head."""
    axis = next(number for number, letter in enumerate(geometry.axes) if letter in "SI")
    return geometry.shape[axis]
