"""How an optimizer is made from parameters."""
