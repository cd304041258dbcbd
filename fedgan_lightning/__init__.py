"""Train GANs over data that must not move."""
