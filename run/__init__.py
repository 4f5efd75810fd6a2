"""What surrounds a run: settings and flags, records, checkpoints, processes."""
