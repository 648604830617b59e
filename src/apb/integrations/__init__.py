"""Other programs that answer from documents in a store."""
