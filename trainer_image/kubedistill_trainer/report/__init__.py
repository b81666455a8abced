"""What a finished job says of its model."""
