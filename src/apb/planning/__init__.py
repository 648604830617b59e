"""The plan of a prefill and its cost, decided before anything runs: pure Python, without torch."""
