"""Differential privacy: what a release costs, secret randomness, the ledger of what was spent, and audits."""
