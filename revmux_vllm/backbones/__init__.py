"""How a frozen transformers classifier is cut in two: for training and as the reference answer.

One module for each shape of model, behind the contract of ``base.py``; which family has which is a
row of ``families.py``. Nothing here knows adapters or an engine.
"""
