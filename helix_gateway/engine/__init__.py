"""The loop: sequences, scheduler, paged KV cache, drafters, verification; tokens only, no text, no devices."""
