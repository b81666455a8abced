"""One module a method, and the loop that they share."""
