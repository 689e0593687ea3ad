"""The control problem: Gymnasium environments that wrap inner training. Knows nothing of PPO."""

from gymnasium.envs.registration import register, registry

from hpo_env.env import HPOEnv, Variation
from hpo_env.vector_env import HPOVectorEnv

__all__ = ["HPOEnv", "HPOVectorEnv", "Variation"]

ENV_ID = "hyperpilot/HPO-v0"

if ENV_ID not in registry:
    register(ENV_ID, entry_point="hpo_env.env:HPOEnv", vector_entry_point="hpo_env.vector_env:HPOVectorEnv")
