"""The training room: rows of text in, a checkpoint folder and what was measured of it out.

A training reads check (``checks.py``), features, fit (``trainer.py``), write (``run.py``); a
measurement is ``measure.py`` and ``evaluate.py``. Recipes, losses, data formats and the report may
be changed here. What adapters compute belongs to ``adapters/``, how they are stored to
``checkpoint/``, how they are served to ``engine/``, which one function of ``measure.py`` asks.
"""
