"""Forward passes of the model: a prompt, further tokens, and single tokens by CUDA graphs."""
