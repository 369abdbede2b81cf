"""Attacks, one module each, and the table of their names."""
