"""The loop: sequences, scheduler, paged KV cache, drafters, verification; tokens only, no text, no devices.

Its compiled code is kept where the runtime's is, which must be settled before numba sees the first function.
"""

import helix_gateway.runtime.cpu  # noqa: F401
