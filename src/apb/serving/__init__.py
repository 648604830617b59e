"""An HTTP server for clients of the OpenAI API: one prompt at a time, on all ranks."""
