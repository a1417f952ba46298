"""OpenCharacterTraining: give an open-weights chat model a character, from a short constitution."""

__version__ = "0.1.0"
