"""The client GAN and its parts."""
