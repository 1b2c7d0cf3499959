"""cldf_dist: distributed training for CLDF, from image-level labels to segmented scans."""

__version__ = "0.1.0"
