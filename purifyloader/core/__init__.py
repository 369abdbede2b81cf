"""Images, keyed noise, sizes, corruptions and devices: what every other package computes with."""
