"""``python -m helix_gateway.cli.chat.served``: ``helix serve``, which ends when its standard input does.

So a server that was started for a conversation never outlives it, however that came to its end.
"""

import os
import signal
import sys
import threading


def main() -> None:
    """Watch the pipe and serve."""
    threading.Thread(target=_end_with_parent, name="parent-watch", daemon=True).start()
    from helix_gateway.cli.main import main as helix

    sys.argv[1:1] = ["serve"]
    helix()


def _end_with_parent() -> None:
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()
