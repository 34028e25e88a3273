"""What an operator does, and what is shown to an operator."""
