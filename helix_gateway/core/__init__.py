"""The words that every room shares, and the Protocols between rooms; no behaviour."""
