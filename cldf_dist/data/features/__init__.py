"""The feature store: cached features, maps and seeds, and the pixels sampled from them."""
