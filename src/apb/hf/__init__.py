"""Everything specific to transformers: loading a model, replacing its attention, its cache, its RoPE."""
