"""Which channels of a network belong together, and what is left of its layers without some."""
