"""Small or strict forms of any experiment; they win over all other groups."""
