"""The server trains the generator by what clients' discriminators say of its samples: what such algorithms share."""
