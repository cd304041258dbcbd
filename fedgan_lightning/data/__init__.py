"""Sources, partitions and the federated data module."""
