"""The small model that ships with the package: tokenizer, data, training, accuracy."""
