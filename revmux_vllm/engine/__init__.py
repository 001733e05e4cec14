"""Every contact with vLLM, a small file per contact."""
