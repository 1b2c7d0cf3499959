"""The trained nets of a run at work: loaded, frozen, asked for features, maps and scores."""
