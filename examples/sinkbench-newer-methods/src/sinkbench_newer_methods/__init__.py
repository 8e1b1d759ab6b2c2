"""Attention methods of 2024 and 2025, each a plugin in one file."""
