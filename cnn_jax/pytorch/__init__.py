"""The tutorial as PyTorch runs it, and what it takes to compare it with this program. Needs the extra `torch`."""
