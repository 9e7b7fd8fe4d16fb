"""The model: one concept of the papers per file."""
