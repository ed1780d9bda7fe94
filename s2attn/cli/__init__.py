"""The command ``s2attn``. Its libraries are the extra ``lab``; without them the command says how to get them."""

from __future__ import annotations

import sys

from s2attn.core import Unsupported

HINT = 's2attn: the command line needs {missing}; install it with: pip install "s2attn[lab]"'


def main() -> None:
    """Run the command line."""
    try:
        from s2attn.cli.app import app
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in ("typer", "rich", "matplotlib", "click"):
            raise
        print(HINT.format(missing=error.name.partition(".")[0]), file=sys.stderr)
        raise SystemExit(2) from None
    except Unsupported as error:  # an extra that another module misses, with its hint
        print("s2attn:", "; ".join(line.strip() for line in str(error).splitlines()), file=sys.stderr)
        raise SystemExit(2) from None
    app()
