"""Generated long-context tasks: documents of any length, questions about them and the right answers."""

from .base import QUERY_START, SHORTEST, TASKS, TAUGHT, Sample, generate, score
from .filler import FILLERS
from .material import Question, TaskError

__all__ = [
    "FILLERS",
    "QUERY_START",
    "SHORTEST",
    "TASKS",
    "TAUGHT",
    "Question",
    "Sample",
    "TaskError",
    "generate",
    "score",
]
