"""Methods that take whole channels, units or taps out of layers."""
