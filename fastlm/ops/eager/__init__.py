"""Backend ``"torch"``: the fast composition of torch ops, on any device; the default on CPU."""
