"""The data plane: distils, checkpoints and reports inside the pods of a gang."""
