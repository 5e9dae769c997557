"""Text in, text out: a model with its tokenizer."""
