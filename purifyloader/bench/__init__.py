"""What a defence is measured with: a real sample, victim networks and their training."""
