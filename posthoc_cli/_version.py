"""The one place of the version: the package, its outputs and its build read it here."""

__version__ = "0.1.0"
