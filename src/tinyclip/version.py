"""The version of the package, where anything may import it."""

__version__ = "0.1.0"
