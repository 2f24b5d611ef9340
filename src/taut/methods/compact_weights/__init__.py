"""Methods that store weights in fewer bytes."""
