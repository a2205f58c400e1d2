"""A process that profiles one device: ``python -m hwsearch.campaign_worker``, started by ``hwsearch.campaigns``.

The request is one JSON line on standard input, the answer one on standard output, words go to standard error. When
standard input ends the process does, in the middle of its campaign too: whoever asked is gone.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import traceback

from hwsearch.campaigns import answer
from hwsearch.console import Console


def main() -> None:
    """Serves the one request."""
    request = json.loads(sys.stdin.readline())

    def listen() -> None:
        sys.stdin.read()
        os._exit(1)

    threading.Thread(target=listen, daemon=True).start()
    status = 1
    try:
        sys.stdout.write(json.dumps(answer(request, Console(json=True))) + "\n")
        sys.stdout.flush()
        status = 0
    except KeyboardInterrupt:  # the terminal tells all its processes; the one that asked has the word
        status = 130
    except Exception:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)  # a thread that waits for standard input cannot be ended otherwise


if __name__ == "__main__":
    main()
