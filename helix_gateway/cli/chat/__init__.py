"""``helix chat``: a conversation in the terminal, with a running server or with one started for it."""
