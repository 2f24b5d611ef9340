"""What a report shows of a model: what can be done to its layers, pictures from weights and results."""

from taut.report.filters import draw_colour_lines, draw_filters
from taut.report.inspection import Inspection, Reach, inspect
from taut.report.remedies import remedy

__all__ = ["Inspection", "Reach", "draw_colour_lines", "draw_filters", "inspect", "remedy"]
