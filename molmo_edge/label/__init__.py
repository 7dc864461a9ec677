"""Labels for many images: `label`, `Labeler`, `Task` and `Source`."""

from molmo_edge.label.labeler import Labeler
from molmo_edge.label.run import Progress, label
from molmo_edge.label.sources import Source
from molmo_edge.label.tasks import Task

__all__ = ["Labeler", "Progress", "Source", "Task", "label"]
