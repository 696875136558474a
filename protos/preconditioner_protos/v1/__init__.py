"""Protocol version 1: the specification and the code generated from it."""
