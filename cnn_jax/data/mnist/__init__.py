"""MNIST itself, embedded, and what reads and prepares it."""
