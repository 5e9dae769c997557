"""The causal language model: configuration, layers, key/value cache, files."""
