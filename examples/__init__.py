"""The other side, and a walk through the product."""
