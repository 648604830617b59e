"""What a prefill computes, where, and what it costs, decided before anything runs: pure Python, without torch."""
