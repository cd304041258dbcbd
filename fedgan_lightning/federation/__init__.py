"""Rounds: sampling, local training, aggregation, the server."""
