"""The feature store: cached features, maps and seeds, and the pixels drawn from them."""
