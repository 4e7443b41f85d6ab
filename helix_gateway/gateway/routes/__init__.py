"""One module an API family."""
