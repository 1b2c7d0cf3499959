"""Synthetic head scans with exact masks: the demo and the tests run on them, without a download.

A patient is a function of (seed, index) alone. A volume is painted tissue by tissue in patient
millimetres from smooth random fields, then sent through a simple scanner model. Lesions overlap
normal tissue in every single channel; their size, texture and surroundings tell them apart.
The digest of the default set is pinned by a test: the phantom is a yardstick, not a parameter.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
from scipy import fft

CHANNELS = ("flair", "t1", "t1ce", "t2")
FIELD_OF_VIEW_MM = (192.0, 192.0, 108.0)  # x, y, z: the head fills it at every grid size
HEALTHY_EVERY = 11  # one patient in so many has no lesion
NECROSIS, OEDEMA, ENHANCING = 1, 2, 4  # labels as in BraTS; 0 is everything else

Volume = npt.NDArray[np.float64]

# Mean signal per channel, in the order of CHANNELS; 1 is about the brightest tissue.
SIGNAL = {
    "air": (0.02, 0.02, 0.02, 0.02),
    "scalp": (0.62, 0.80, 0.82, 0.58),
    "skull": (0.10, 0.11, 0.12, 0.08),
    "fluid": (0.16, 0.17, 0.19, 0.92),
    "grey": (0.60, 0.45, 0.49, 0.60),
    "white": (0.46, 0.62, 0.65, 0.43),
    "hyperintensity": (0.88, 0.53, 0.56, 0.66),
    "vessel": (0.40, 0.45, 0.98, 0.25),
    "plexus": (0.66, 0.45, 0.95, 0.72),
    "oedema": (0.74, 0.45, 0.49, 0.73),
    "enhancing": (0.66, 0.50, 0.86, 0.66),
    "necrosis": (0.42, 0.30, 0.34, 0.84),
}


@dataclass(frozen=True)
class PhantomSettings:
    """Size of the synthetic set. More patients or another order leave each patient unchanged."""

    num_patients: int = 44
    num_slices: int = 24
    grid_size: int = 64  # pixels along each in-plane side
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low in (("num_patients", 1), ("num_slices", 4), ("grid_size", 16), ("seed", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be >= {low}, got {getattr(self, name)}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels along x, y and z."""
        return (self.grid_size, self.grid_size, self.num_slices)

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel size in mm along x, y and z: the field of view is the same for every grid."""
        x, y, z = (extent / size for extent, size in zip(FIELD_OF_VIEW_MM, self.shape))
        return (x, y, z)


def phantom_patient(
    index: int, settings: PhantomSettings
) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.uint8], npt.NDArray[np.float64]]:
    """Return one patient: image, mask, affine.

    The image is (channels, x, y, slices), 0 to about 1500; the mask is (x, y, slices) with labels
    0, 1 necrosis, 2 oedema, 4 enhancing (the object is whatever exceeds 0). Array axes run to the
    patient's left, back and head, as in BraTS; the 4x4 affine leads to mm right, front, head.
    """
    if not 0 <= index < settings.num_patients:
        raise ValueError(f"index must be in [0, {settings.num_patients}), got {index}")
    grid = _Grid(settings)
    source = np.random.default_rng(np.random.SeedSequence((settings.seed, index)))
    anatomy_rng, lesion_rng, scanner_rng = source.spawn(3)
    head = _Head(grid, anatomy_rng)
    image = _paint_anatomy(grid, head, anatomy_rng)
    mask = np.zeros(settings.shape, np.uint8)
    is_healthy = index % HEALTHY_EVERY == HEALTHY_EVERY // 2
    for _ in range(0 if is_healthy else 1 + lesion_rng.integers(4) // 3):
        _paint_lesion(grid, head, lesion_rng, image, mask)
    affine = np.diag([*(s * d for s, d in zip(settings.spacing, (-1, -1, 1))), 1.0])
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(settings.shape) - 1) / 2)
    return _scan(grid, scanner_rng, image), mask, affine


class _Grid:
    """Coordinates of the voxels in mm and smooth random fields on them."""

    def __init__(self, settings: PhantomSettings) -> None:
        self.shape, self.spacing = settings.shape, settings.spacing

    @cached_property
    def coordinates(self) -> Volume:
        """Coordinates in mm from the centre of the field of view: (3, x, y, slices)."""
        axes = [(np.arange(n) - (n - 1) / 2) * mm for n, mm in zip(self.shape, self.spacing)]
        return np.stack(np.meshgrid(*axes, indexing="ij"))

    @cached_property
    def _squared_frequency(self) -> Volume:
        """(2 pi cycles per mm)^2 on the half spectrum of the grid."""
        x, y, z = (fft.fftfreq(n, mm) for n, mm in zip(self.shape, self.spacing))
        z = np.abs(z[: self.shape[2] // 2 + 1])
        total = x[:, None, None] ** 2 + y[None, :, None] ** 2 + z[None, None, :] ** 2
        return np.asarray((2 * np.pi) ** 2 * total)

    def smooth(self, volume: Volume, width_mm: float) -> Volume:
        """Blur with a periodic Gaussian of standard deviation `width_mm`."""
        spectrum = fft.rfftn(volume) * np.exp(-0.5 * width_mm**2 * self._squared_frequency)
        return np.asarray(fft.irfftn(spectrum, s=self.shape))

    def field(self, rng: np.random.Generator, width_mm: float) -> Volume:
        """A Gaussian random field of mean 0 and variance 1, smooth on the scale of `width_mm`."""
        values = self.smooth(rng.standard_normal(self.shape), width_mm)
        return np.asarray((values - values.mean()) / (values.std() + 1e-12))


class _Head:
    """Fractions of every normal tissue, 0 to 1, with soft edges: (x, y, slices) each."""

    def __init__(self, grid: _Grid, rng: np.random.Generator) -> None:
        self.x, self.y, self.z = self._patient_coordinates(grid, rng)
        depth = self._depth_mm(rng)
        scalp_mm, skull_mm = rng.uniform(4.5, 7.5), rng.uniform(4.0, 6.5)
        self.head = _edge(depth, 3)
        self.inside_scalp = _edge(depth - scalp_mm, 3)
        self.inside_skull = _edge(depth - scalp_mm - skull_mm, 3)
        self.depth = depth - scalp_mm - skull_mm - rng.uniform(1.5, 4)  # below the brain's surface
        self.brain = _edge(self.depth, 3)
        self._add_ventricles(rng)
        self._add_cortex(grid, rng)
        self._add_hyperintensities(grid, rng)
        self._add_vessels(grid, rng)

    def _patient_coordinates(self, grid: _Grid, rng: np.random.Generator) -> Volume:
        """Coordinates in mm from the middle of the brain, in a turned and gently warped frame."""
        x, y, z = grid.coordinates - np.array([*rng.uniform(-5, 5, 2), -18.0])[:, None, None, None]
        turn = np.deg2rad(rng.uniform(-9, 9))
        tilt = rng.uniform(-0.12, 0.12)
        x, y = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
        warp = [rng.uniform(1.5, 2.5) * grid.field(rng, 25) for _ in range(3)]
        return np.stack([x + warp[0], y + tilt * z + warp[1], z - tilt * y + warp[2]])

    def _depth_mm(self, rng: np.random.Generator) -> Volume:
        """About the distance to the surface of the head: an egg, wider behind, flat below."""
        half_x, half_y, top = rng.uniform(66, 75), rng.uniform(80, 90), rng.uniform(66, 74)
        half_x = half_x * (1 + 0.0008 * self.y)
        half_z = np.where(self.z > 0, top, 1.7 * top)
        radius = np.sqrt((self.x / half_x) ** 2 + (self.y / half_y) ** 2 + (self.z / half_z) ** 2)
        return np.asarray((1 - radius) * 75)

    def _ellipsoid(self, centre: tuple[float, ...], half: tuple[float, ...], turn: float) -> Volume:
        """About the signed distance in mm to an ellipsoid's surface, positive inside."""
        x, y, z = (a - c for a, c in zip((self.x, self.y, self.z), centre))
        x, y = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
        radius = np.sqrt((x / half[0]) ** 2 + (y / half[1]) ** 2 + (z / half[2]) ** 2)
        return np.asarray((1 - radius) * min(half))

    def _add_ventricles(self, rng: np.random.Generator) -> None:
        size, apart = rng.uniform(0.7, 1.5), rng.uniform(9, 13)
        inside, plexus, deep_grey = [], [], []
        for side in (-1, 1):
            own = size * rng.uniform(0.85, 1.2)
            turn = side * rng.uniform(0.10, 0.35)
            back, up = rng.uniform(-4, 6), rng.uniform(4, 9)
            half = (4.5 * own + 1.5, 20 + 7 * own, 9 + 4 * own)
            inside.append(self._ellipsoid((side * apart, back, up), half, turn))
            where = (side * (apart + 2), back + rng.uniform(4, 14), up + rng.uniform(-5, 2))
            plexus.append(self._ellipsoid(where, (4, 7, 6), turn))
            thalamus = (side * (apart + 3), 10 + rng.uniform(-3, 3), up - 16)
            striatum = (side * (apart + 14), -4 + rng.uniform(-3, 3), up - 9)
            deep_grey.append(self._ellipsoid(thalamus, (8, 11, 9), -turn))
            deep_grey.append(self._ellipsoid(striatum, (6, 15, 11), turn))
        inside.append(self._ellipsoid((0, 8, -8), (2.5 + size, 11, 11), 0.0))
        self.ventricle_distance = np.max(inside, axis=0)
        self.ventricles = _edge(self.ventricle_distance, 3) * self.brain
        self.plexus = _edge(np.max(plexus, axis=0), 4) * self.ventricles
        self.deep_grey = _edge(np.max(deep_grey, axis=0), 5)

    def _add_cortex(self, grid: _Grid, rng: np.random.Generator) -> None:
        """Folded grey matter: a ribbon along the surface and along sheets that cut into it."""
        width_mm = rng.uniform(4.0, 5.0)
        sheet = 1.4 * width_mm * np.abs(grid.field(rng, width_mm))  # about mm from a sheet
        sheet = sheet + np.maximum(self.depth - rng.uniform(9, 14), 0)
        fissure = np.abs(self.x) + np.maximum(self.depth - 24, 0) + np.maximum(-self.z, 0)
        sulcus = np.minimum(sheet, fissure)
        ribbon = _edge(rng.uniform(3.2, 4.2) - np.minimum(sulcus, self.depth), 2)
        self.grey = np.maximum(ribbon, 0.8 * self.deep_grey) * self.brain
        self.sulci = _edge(rng.uniform(0.6, 1.4) - sulcus, 2) * self.brain

    def _add_hyperintensities(self, grid: _Grid, rng: np.random.Generator) -> None:
        """Bright spots of the ageing white matter: caps at the ventricles, patches and dots."""
        load = rng.uniform(0.2, 1.0)
        outside = -self.ventricle_distance
        caps = _edge(6 * load + 3 * grid.field(rng, 10) - outside - 2, 4)
        patches = _edge(4 * (grid.field(rng, 5) - 2.8 + 0.7 * load), 4) * _edge(26 - outside, 10)
        dots = _edge(4 * (grid.field(rng, 3.2) - 3.0 + 0.7 * load), 4)
        spots = np.maximum(caps, np.maximum(patches, dots))
        white = self.brain * (1 - self.grey) * _edge(self.depth - 8, 4)
        self.hyperintensity = spots * white * rng.uniform(0.6, 1.0)

    def _add_vessels(self, grid: _Grid, rng: np.random.Generator) -> None:
        """Tubes where two fields vanish together, near the surface, and the sagittal sinus."""
        apart = np.sqrt(grid.field(rng, 11) ** 2 + grid.field(rng, 11) ** 2)
        tubes = _edge(2.2 - 11 * apart, 2.5) * _edge(22 - self.depth, 14)
        sinus = _edge(4 - np.abs(self.x), 3) * _edge(3.5 - np.abs(self.depth), 3)
        self.vessels = np.maximum(tubes, sinus * _edge(self.z - 5, 20)) * self.inside_skull


def _paint_anatomy(grid: _Grid, head: _Head, rng: np.random.Generator) -> Volume:
    """The signal of a healthy head: (channels, x, y, slices)."""
    signal = {name: np.array(mean) * rng.normal(1, 0.04, 4) for name, mean in SIGNAL.items()}
    image = np.broadcast_to(np.reshape(signal["air"], (4, 1, 1, 1)), (4, *grid.shape)).copy()
    fat = np.clip(0.80 + 0.22 * grid.field(rng, 9), 0.3, 1.2)
    fine, coarse = grid.field(rng, 3.0), grid.field(rng, 8.0)
    _paint(image, head.head, signal["scalp"], fat)
    _paint(image, head.inside_scalp, signal["skull"])
    _paint(image, head.inside_skull, signal["fluid"])
    _paint(image, head.brain, signal["white"], 1 + 0.03 * fine + 0.04 * coarse)
    _paint(image, head.grey, signal["grey"], 1 + 0.06 * fine)
    _paint(image, head.hyperintensity, signal["hyperintensity"])
    _paint(image, head.sulci, signal["fluid"])
    _paint(image, head.ventricles, signal["fluid"])
    _paint(image, head.plexus, signal["plexus"])
    _paint(image, head.vessels, signal["vessel"])
    return image


def _paint_lesion(
    grid: _Grid, head: _Head, rng: np.random.Generator, image: Volume, mask: npt.NDArray[np.uint8]
) -> None:
    """Add one lesion to `image` and `mask`: oedema around a core, which may be hollow."""
    is_small = rng.random() < 0.25
    radius = rng.uniform(12, 16) if is_small else rng.uniform(17, 29)
    outside = _distance_to_random_centre(grid, head, rng, radius)
    ragged = radius * (0.22 * grid.field(rng, 9) + 0.10 * grid.field(rng, 4.5))
    tissue = head.brain * (1 - head.ventricles)
    whole = _edge(radius + ragged - outside, 5) * tissue
    has_core = is_small or rng.random() < 0.85  # else a mere spot
    core_radius = radius * rng.uniform(0.40, 0.70) * has_core
    core_depth = core_radius * (1 + 0.25 * grid.field(rng, 6)) - outside
    core = _edge(core_depth, 4) * whole
    rim_mm = rng.uniform(3, 6) if rng.random() < 0.75 else 2 * radius
    necrosis = _edge(core_depth - rim_mm, 4) * core

    signal = {name: np.array(SIGNAL[name]) * rng.normal(1, 0.03, 4) for name in SIGNAL}
    strength, uptake = rng.uniform(0.85, 1.0), rng.uniform(0.7, 1.0)
    mottle = grid.field(rng, 5)
    _paint(image, strength * whole, signal["oedema"], 1 + 0.08 * mottle)
    _paint(image, uptake * core, signal["enhancing"], 1 + 0.10 * mottle)
    _paint(image, necrosis, signal["necrosis"], 1 + 0.05 * mottle)

    mask[whole > 0.5] = OEDEMA
    mask[core > 0.5] = ENHANCING
    mask[necrosis > 0.5] = NECROSIS


def _distance_to_random_centre(
    grid: _Grid, head: _Head, rng: np.random.Generator, radius: float
) -> Volume:
    """Distance in mm from a point of the brain, in a frame that is stretched at random."""
    low, high = np.quantile(head.z, (0.12, 0.85))
    inside = (head.depth > 6 + 0.4 * radius) & (head.ventricles < 0.5)
    candidates = np.flatnonzero(inside & (head.z > low) & (head.z < high))
    if candidates.size == 0:
        candidates = np.array([np.argmax(head.depth)])
    centre = np.unravel_index(candidates[rng.integers(candidates.size)], grid.shape)
    offset = grid.coordinates - grid.coordinates[(slice(None), *centre)][:, None, None, None]
    turn, stretch = rng.uniform(0, np.pi), rng.uniform(0.8, 1.25)
    x = offset[0] * np.cos(turn) + offset[1] * np.sin(turn)
    y = offset[1] * np.cos(turn) - offset[0] * np.sin(turn)
    tall = rng.uniform(1.0, 1.5)
    distance = np.sqrt((x * stretch) ** 2 + (y / stretch) ** 2 + (offset[2] / tall) ** 2)
    return np.asarray(distance)


def _scan(grid: _Grid, rng: np.random.Generator, image: Volume) -> npt.NDArray[np.int16]:
    """Blur, shade, distort the grey scale, add Rician noise and quantise each channel."""
    shared_shading = grid.field(rng, 60)
    noise = rng.uniform(0.018, 0.035)
    scanned = np.empty(image.shape, np.int16)
    for channel, signal in enumerate(image):
        shading = 1 + 0.12 * shared_shading + 0.08 * grid.field(rng, 50)
        blurred = np.clip(grid.smooth(signal, 1.2), 0, None)
        shaded = np.clip(shading, 0.6, 1.5) * blurred ** rng.uniform(0.85, 1.2)
        real, imaginary = noise * rng.standard_normal((2, *grid.shape))
        magnitude = np.sqrt((shaded + real) ** 2 + imaginary**2)
        gain = rng.uniform(800, 1200)
        scanned[channel] = np.rint(np.clip(gain * magnitude, 0, 4095)).astype(np.int16)
    return scanned


def _edge(distance_mm: Volume, width_mm: float) -> Volume:
    """0 outside, 1 inside, 1/2 at distance 0; smooth over `width_mm` on either side.

    A polynomial and not a logistic function: the same bits on every processor.
    """
    ramp = np.clip(0.5 + 0.5 * distance_mm / width_mm, 0, 1)
    return np.asarray(ramp * ramp * (3 - 2 * ramp))


def _paint(image: Volume, fraction: Volume, signal: Volume, texture: Volume | float = 1.0) -> None:
    """Mix a tissue into `image` in place, by its fraction of each voxel."""
    for channel, value in enumerate(signal):
        image[channel] += fraction * (value * texture - image[channel])
