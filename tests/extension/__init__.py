"""What a user of the package adds from outside: a strategy, a compressor and a decode method, each with an option."""
