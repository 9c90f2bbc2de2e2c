"""Shards as tasks for the workers of a Ray cluster, each of which holds an engine.

The driver hands out rows of the data set, and takes back features: it alone writes, so
that workers need to see the images and nothing else. What a lost worker had not handed
back is done again by another.
"""

from __future__ import annotations

from ._cluster import connected, import_ray
from ._pool import Task, run_tasks
from ._worker import Made, Work

__all__ = ["Made", "Task", "Work", "connected", "import_ray", "run_tasks"]
