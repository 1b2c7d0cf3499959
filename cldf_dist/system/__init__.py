"""The services of a run: processes, files, locks, signals, progress, seeds."""
