"""The tuner in other people's trainers. Import the module that you need: each needs its own package."""
