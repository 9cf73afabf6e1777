"""Aliases, 8-bit states and the family, one file a method."""
