"""``python benchmarks/run.py [op ...]``; the same as ``python -m fastlm.benchmarks``."""

import sys

from fastlm.benchmarks.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
