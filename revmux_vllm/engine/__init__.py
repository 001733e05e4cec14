"""The plugin: the only room that imports vLLM, one file for each contact with it.

What is decided here is how a plan becomes rows of vLLM's batch. Who runs with whom is decided in
``planning/``, and how rows are combined in ``adapters/``. A change here is held against
transformers by the parity tests, and everything that is relied on in vLLM stands in
``tests/engine/test_contract.py``.
"""
