"""Teachers: the dense models to binarize, and their decoder blocks."""
