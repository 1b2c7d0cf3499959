"""The data on disk: native scans, prepared slices in shards, the sample stream, the cache."""
