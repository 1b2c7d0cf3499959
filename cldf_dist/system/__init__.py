"""What runs need of the machine: processes, files, locks, signals, progress, seeds."""
