"""``revmux bench``: how much faster, in the engine alone and behind HTTP under load.

A command reads its options into frozen settings (``settings.py``), reads the model and makes the
texts (``workload.py``, ``lengths.py``), measures (``offline.py``, or ``online.py`` with the modules
of servers and client), and prints one report as JSON, tables or a picture.

May be touched here: what is measured, how often, and how it is shown. Ratios compare two
measurements of one run, in alternating order, and the layer limit stands beside them. Not here: how
an engine starts, its environment and its scheduler, which are ``engine/in_process.py`` and
``engine/plain.py``; nothing in this room imports vLLM or sets an environment variable.
"""
