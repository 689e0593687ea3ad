"""What gets trained: data sets, models, tasks, and two ways to train them. Knows nothing of reinforcement learning."""
