"""Methods that let groups of filters share what they compute."""
