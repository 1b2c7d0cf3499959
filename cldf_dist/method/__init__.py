"""CLDF's own steps as functions of tensors and arrays."""
