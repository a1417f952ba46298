"""The distilled model reflects on itself and learns from it."""
