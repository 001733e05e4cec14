"""``revmux bench``: how much faster, in the engine alone and behind HTTP under load."""
