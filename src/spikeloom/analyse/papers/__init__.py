"""Measurements and figures of the papers."""
