"""Methods that write a layer as a product of smaller ones."""
