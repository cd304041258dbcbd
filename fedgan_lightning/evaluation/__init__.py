"""Metrics that never move samples."""
