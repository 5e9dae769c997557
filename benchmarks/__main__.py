"""``python -m fastlm.benchmarks``, the same as ``fastlm bench``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from fastlm._errors import ArgumentError, UserError
from fastlm.benchmarks import _options


def main(argv: Sequence[str] | None = None, prog: str = "python -m fastlm.benchmarks") -> int:
    """Exit code: 0, 1 when something failed, 2 when a flag is wrong."""
    try:
        options = _options.parse(sys.argv[1:] if argv is None else argv, prog)
        # here and not above: help needs no torch
        from fastlm.benchmarks import _suite

        return _suite.run(options)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, ArgumentError) else 1


if __name__ == "__main__":
    sys.exit(main())
