"""Builders of Kubernetes objects: pure functions, so that the same job gives the same objects."""
