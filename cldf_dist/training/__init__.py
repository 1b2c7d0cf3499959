"""The training loop, its checkpoints, and trained nets as files."""
