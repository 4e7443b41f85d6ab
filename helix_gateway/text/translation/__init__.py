"""Between the tokens of two models: what lets a draft model with another tokenizer draft for a target."""
