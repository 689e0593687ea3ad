"""Controllers of hyperparameters: the saved policy, the tuner, meta-training, baselines.

Importing this package imports neither stable-baselines3 nor tensorboard.
"""

from .policy import ControlPolicy, PolicyError
from .tuner import Tuner

__all__ = ["ControlPolicy", "PolicyError", "Tuner"]
