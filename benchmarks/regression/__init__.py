"""Whether an op has become slower beside torch; run by ``make bench-check``."""
