"""Ask a question of a very long text: fast prefill for any causal decoder of transformers."""

__version__ = "0.1.0"
