"""Hugging Face model folders in S3: load, make smaller, export."""
