"""One file per shape of model: vLLM's own layers in two trunks, and the head.

What all share is ``base.py``. A new family is a class here and a row of ``families.py``.
"""
