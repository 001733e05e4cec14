"""The GPU kit: what ``run.py`` beside this runs on a machine with a GPU. See ``docs/gpu.md``."""
