"""Long-context tasks: made on the fly, learned along a curriculum of lengths, scored as depth x length maps."""

from experiments.tasks.base import Task, TaskBatch
from experiments.tasks.heatmap import heat_map
from experiments.tasks.kinds import TASKS, Copy, Needle, Passkey, Recall, Tracking, task_named
from experiments.tasks.learn import Curriculum, learn
from experiments.tasks.rope import stretched
from experiments.tasks.score import Scores, Stretch, right_answers, score_task

__all__ = [
    "TASKS",
    "Copy",
    "Curriculum",
    "Needle",
    "Passkey",
    "Recall",
    "Scores",
    "Stretch",
    "Task",
    "TaskBatch",
    "Tracking",
    "heat_map",
    "learn",
    "right_answers",
    "score_task",
    "stretched",
    "task_named",
]
