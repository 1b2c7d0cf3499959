"""cldf_dist: distributed training for CLDF, from image-level labels to segmented scans."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cldf_dist.cli.new_scans import load_segmenter

__all__ = ["__version__", "load_segmenter"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """The Python API, imported when it is asked for: `import cldf_dist` alone imports no torch."""
    if name == "load_segmenter":
        from cldf_dist.cli.new_scans import load_segmenter

        return load_segmenter
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
