"""The version of irl-align, which the build reads here."""

__version__ = "0.1.0"
