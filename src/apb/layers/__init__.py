"""Attention by kind of layer: the parts that all strategies share, in prefill and in decode."""
