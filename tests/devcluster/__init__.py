"""A real control plane, a real S3 server and a small node, for the demo and the tests."""
