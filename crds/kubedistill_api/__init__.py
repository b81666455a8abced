"""The contract: models of both resources and of what operator and trainer hand each other."""
