"""Small scripts of our own that make the calls of well-known training scripts, in their order.

Each names the script it stands for, and marks the one line that is added to it with `# <-`.
"""
