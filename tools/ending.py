"""How a tool ends: with what its ``main`` returns, or with one line and a status where hwsearch says no."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from hwsearch.errors import HwsearchError


def leave(main: Callable[[], int]) -> NoReturn:
    """Run ``main`` and leave the process."""
    try:
        sys.exit(main())
    except HwsearchError as error:
        print(f"{Path(sys.argv[0]).stem}: error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
