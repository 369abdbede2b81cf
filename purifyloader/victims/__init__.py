"""Victims: classifiers trained on poisoned or purified data by attacks, benches and certificates."""
