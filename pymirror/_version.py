"""The one place that holds the version; the shim is compiled with it, pyproject.toml reads it."""

__version__ = "0.1.0"
