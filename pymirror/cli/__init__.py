"""The command line: one module a subcommand, and a frame in main.py."""
