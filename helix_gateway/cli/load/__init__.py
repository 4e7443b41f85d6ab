"""A load generator for OpenAI-compatible servers: prompts, requests in time, figures.  `helix bench` is its face."""
