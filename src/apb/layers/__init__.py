"""Attention by kind of layer: what every strategy shares, in prefill and in decode."""
