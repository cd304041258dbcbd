"""Federations between machines, on Flower: the same task out, the same update back."""
