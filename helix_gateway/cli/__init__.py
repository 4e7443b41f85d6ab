"""The `helix` command: one module a subcommand, each importing what is heavy only once it runs."""
