"""``python -m helix_gateway`` is the `helix` command."""

from helix_gateway.cli.main import main

if __name__ == "__main__":
    main()
