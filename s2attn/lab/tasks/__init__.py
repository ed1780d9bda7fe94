"""Long-context tasks: made on the fly, learned along a curriculum of lengths, scored as depth x length maps."""

from s2attn.lab.tasks.base import Task, TaskBatch
from s2attn.lab.tasks.heatmap import heat_map
from s2attn.lab.tasks.kinds import TASKS, Copy, Needle, Passkey, Recall, Tracking, task_named
from s2attn.lab.tasks.learn import Curriculum, learn
from s2attn.lab.tasks.rope import stretched
from s2attn.lab.tasks.score import Scores, Stretch, right_answers, score_task

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
