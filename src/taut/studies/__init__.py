"""What a study stands on: a resumable grid of runs, results beside their environment, and the list of claims."""

from taut.studies.grid import Cell, run_grid
from taut.studies.results import Bound, environment, load_average, write_results

__all__ = ["Bound", "Cell", "environment", "load_average", "run_grid", "write_results"]
