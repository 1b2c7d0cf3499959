"""One command for a comparison over several experiments, trainings and variants: `cldf study`."""
