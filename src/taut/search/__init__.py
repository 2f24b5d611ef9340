"""From a budget to the best model within it: one plan after the other is made, built and judged."""
