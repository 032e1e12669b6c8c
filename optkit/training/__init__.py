"""Training: one loop for every pass that learns, with a teacher or without, and the hooks that may change it."""

from optkit.training.hooks import Hooks, Parts, State, load_hooks
from optkit.training.loop import train
from optkit.training.settings import Objective, Training

__all__ = ["Hooks", "Objective", "Parts", "State", "Training", "load_hooks", "train"]
