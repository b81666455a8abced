"""The control plane: watches resources, plans purely, acts thinly."""
