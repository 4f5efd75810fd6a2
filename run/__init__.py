"""What surrounds a run: settings, flags, records, checkpoints, processes, compiling, the head."""
