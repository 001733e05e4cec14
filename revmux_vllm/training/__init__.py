"""Adapters for a frozen classifier: data, losses, trainer and evaluation."""
