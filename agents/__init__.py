"""Controllers of hyperparameters: the saved policy, the tuner, meta-training, baselines.

Importing this package imports neither stable-baselines3 nor tensorboard.
"""

from inner_models.augmentation import Augment

from .policy import ControlPolicy, PolicyError
from .tuner import Tuner

__all__ = ["Augment", "ControlPolicy", "PolicyError", "Tuner"]
