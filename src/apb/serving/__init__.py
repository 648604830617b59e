"""Answering questions over HTTP, as clients of the OpenAI API ask them: one prompt after the other, on all ranks."""
