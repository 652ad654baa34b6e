"""What changes while training, and what it minimizes."""
