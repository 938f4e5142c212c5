"""The version of the package; imports nothing, so that every layer may know it."""

__version__ = "0.1.0"
