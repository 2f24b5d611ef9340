"""What a network costs, how long it takes and how good it is: counted, timed and scored on the user's own terms."""

from taut.measure.accuracy import Difference, Metric, Score, difference, measure
from taut.measure.counting import Count, count, count_macs
from taut.measure.latency_model import Pace
from taut.measure.rounds import interleave
from taut.measure.storage import file_bytes, stored_tensors
from taut.measure.timing import Latency, Pair, Searched, Stopwatch, Times, busy_note, latencies, model_times

__all__ = [
    "Count",
    "Difference",
    "Latency",
    "Metric",
    "Pace",
    "Pair",
    "Score",
    "Searched",
    "Stopwatch",
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
