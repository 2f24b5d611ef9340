"""What a report shows of a model: pictures from weights and results."""

from taut.report.filters import draw_colour_lines, draw_filters

__all__ = ["draw_colour_lines", "draw_filters"]
