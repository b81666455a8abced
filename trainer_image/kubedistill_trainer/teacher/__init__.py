"""Teacher streams: outputs of a teacher, written once through S3, read by many students."""
