"""Getting quality back without training."""
