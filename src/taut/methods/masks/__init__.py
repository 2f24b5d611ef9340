"""Methods that set weights to zero."""
