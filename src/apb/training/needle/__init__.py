"""The small model shipped with the package: tokenizer, data, training, accuracy."""
