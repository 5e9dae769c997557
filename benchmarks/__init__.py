"""Benchmarks of fastlm against what else there is; run by ``python benchmarks/run.py``."""
