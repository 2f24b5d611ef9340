"""What is worth keeping: scores of weights, and the selection that hits a wanted sparsity exactly."""

from taut.criteria.scores import SCORES, score
from taut.criteria.selection import above, mean_percentile, smallest, within_runs

__all__ = ["SCORES", "above", "mean_percentile", "score", "smallest", "within_runs"]
