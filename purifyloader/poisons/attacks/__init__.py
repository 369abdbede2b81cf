"""The attacks, one module each, and the registry of their names."""
