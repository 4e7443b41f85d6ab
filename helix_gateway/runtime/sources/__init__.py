"""Where models come from: the default model out of its package, and hubs."""
