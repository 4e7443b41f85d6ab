"""Starts the engine's process: ``python -m helix_gateway.service.engine_process_main``.

Only here because one thing must happen before anything else is imported.  Knows nothing about engines.
"""

from helix_gateway.runtime.cpu.threads import load_openmp

if __name__ == "__main__":
    load_openmp()

    from helix_gateway.service.engine_process import main

    main()
