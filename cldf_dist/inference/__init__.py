"""Inference with the trained nets of a run: loading, features, maps and scores."""
