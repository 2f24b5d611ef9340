"""What a network costs, how long it takes and how good it is: counted, timed and scored on the user's own terms."""

from taut.core.deprecation import forward_names
from taut.measure.accuracy import Difference, Metric, Score, difference, measure
from taut.measure.counting import Count, count, count_macs
from taut.measure.latency_model import LatencyModel
from taut.measure.rounds import interleave
from taut.measure.storage import file_bytes, stored_tensors
from taut.measure.timing import Latency, LatencyMeter, Pair, Searched, Times, busy_note, latencies, model_times

__all__ = [
    "Count",
    "Difference",
    "Latency",
    "LatencyMeter",
    "LatencyModel",
    "Metric",
    "Pair",
    "Score",
    "Searched",
    "Times",
    "busy_note",
    "count",
    "count_macs",
    "difference",
    "file_bytes",
    "interleave",
    "latencies",
    "measure",
    "model_times",
    "stored_tensors",
]

__getattr__ = forward_names(
    __name__,
    {
        "Pace": (LatencyModel, "taut.measure.LatencyModel"),
        "Stopwatch": (LatencyMeter, "taut.measure.LatencyMeter"),
    },
)
