"""Synthetic tasks with exact labels: one file each, found by its name, which is what `data.source` says."""

from seqtrain.data.synthetic._base import TASKS, SyntheticBatches, SyntheticCorpus, Task, examples, make_task

__all__ = ["TASKS", "SyntheticBatches", "SyntheticCorpus", "Task", "examples", "make_task"]
