"""What lies in a model's files: GGUF, and folders in Hugging Face layout with safetensors."""
