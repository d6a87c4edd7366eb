"""Measurements behind every published figure; see README.md."""
