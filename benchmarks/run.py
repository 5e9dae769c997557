"""``python benchmarks/run.py [op ...]``: ``fastlm bench`` in a checkout, without tyro."""

import sys

from fastlm.benchmarks.__main__ import main

if __name__ == "__main__":
    sys.exit(main(prog="benchmarks/run.py"))
