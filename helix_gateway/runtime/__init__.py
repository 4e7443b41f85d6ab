"""Models on devices: loading, attention over pages, products, sampling, the model runner; no requests, no text."""
