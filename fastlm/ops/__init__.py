"""One module per public op: its promise, checks, gradient, shapes and registration."""
