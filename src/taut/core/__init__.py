"""What everything stands on: inputs and modes, files, randomness, progress, words."""
