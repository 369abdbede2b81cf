"""Measure defences: poison a training set, purify it, train a victim, and report its accuracy."""
