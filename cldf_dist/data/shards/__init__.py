"""Prepared slices in indexed webdataset shards: written, read, staged from elsewhere."""
