"""Teacher streams: a teacher's outputs, written once through S3 and read by any number of students."""
