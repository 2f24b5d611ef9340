"""What each layer could become, the best choice of all within limits, and the model made of it."""
