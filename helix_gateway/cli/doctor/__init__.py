"""``helix doctor``: what this machine has, how an engine fares on it, and what to do about what is wrong."""
