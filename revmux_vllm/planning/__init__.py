"""Who runs now, with whom, and at which rung: plain Python over plain records.

Nothing here knows vLLM or torch, so that the engine's scheduler, the simulation and the tests all
ask the very same planner. A change here may touch what a step is made of; how rows are combined is
``adapters/``, and how the engine lays them out is ``engine/``.
"""
