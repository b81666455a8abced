"""Models made smaller: what of them matters least, and models without it."""
