"""A node for development and tests: runs pods as local processes, as strictly as a kubelet where
the product could be wrong. Never part of an image."""
