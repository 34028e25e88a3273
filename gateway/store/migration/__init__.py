"""Everything of one store into another."""
