"""Fronts, replicas and traffic in simulated time; ``simulate_router.py`` is the command."""
