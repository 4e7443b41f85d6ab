"""Starts what compiles ahead of an engine: ``python -m helix_gateway.service.compiling_ahead_main``; with a dtype of keys
and values behind it, what drafts by the target's weights at fewer bits over these.

Only here because two things must happen before anything heavy is imported.  Ends when it is done, or with the process that
started it, which holds its standard input.  Knows nothing about what is compiled.
"""

import signal
import sys
import threading

if __name__ == "__main__":
    # Ctrl-C reaches the whole group; that this is no longer needed shows in the parent's end, or in being killed by it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    from helix_gateway.service.parent import end_with_parent

    threading.Thread(target=end_with_parent, name="parent-watch", daemon=True).start()

    from helix_gateway.service.compiling_ahead import compile_ahead, compile_fewer_bits

    if sys.argv[1:]:
        compile_fewer_bits(*sys.argv[1:])
    else:
        compile_ahead()
