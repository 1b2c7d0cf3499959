"""Net and loss in one module: what `fit` trains."""
