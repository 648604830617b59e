"""All that knows transformers: taking over a model's attention, its cache, its RoPE, loading."""
