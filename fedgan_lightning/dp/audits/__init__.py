"""Attacks on what a federation gives away, and what their success means: measured, beside what is proved."""
