"""Studies: one of a user's model, and what every other stands on: resumable grids, results, the list of claims."""

from taut.studies.grid import Cell, run_grid
from taut.studies.making import Subject
from taut.studies.results import Bound, environment, load_average, write_results
from taut.studies.studying import study
from taut.studies.wishes import Grid

__all__ = ["Bound", "Cell", "Grid", "Subject", "environment", "load_average", "run_grid", "study", "write_results"]
