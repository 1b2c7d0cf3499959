"""Prepared slices in indexed webdataset shards: writing, reading, staging of remote ones."""
