"""The one training loop: losses, what is frozen, the state that survives a kill, and the loop itself."""
