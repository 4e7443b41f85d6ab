"""Tokens to text and back: tokenizers, detokenizers, chat templates, stop strings; no HTTP, tensors or sequences."""
